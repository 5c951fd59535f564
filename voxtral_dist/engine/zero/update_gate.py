"""The decision whether an update is made, between DeepSpeed's norm of the gradient and its change of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors, is_invalid_grad_norm
from torch import Tensor, nn

from voxtral_dist.engine.engine import always


class UpdateGate:
    """Asks the caller of `Engine.step` about the update whose norm has just been measured.

    Stages 1 to 3 skip an update whose norm is not finite, on all ranks, and zero its gradients: to refuse one, its
    norm is reported as infinite. Stage 0 has no such way; torch's optimizers leave parameters without gradients alone.
    """

    def __init__(self) -> None:
        self._accepts: Callable[[float], bool] = always
        # Of the update under way: its norm, and whether the caller refused it.
        self.grad_norm = math.nan
        self.is_refused = False

    def expect(self, accepts: Callable[[float], bool]) -> None:
        """Prepare for an update."""
        self._accepts, self.grad_norm, self.is_refused = accepts, math.inf, False

    def install(self, optimizer: Any, stage: int) -> None:
        """Watch the norm that DeepSpeed's optimizer of stage 1, 2 or 3 measures."""
        if stage == 3:
            norms_of_groups = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: [self._passed(norms_of_groups(), optimizer)]
        elif isinstance(optimizer, BF16_Optimizer):
            self._install_in_bfloat16(optimizer)
        else:
            measure = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda *given: self._passed([measure(*given)], optimizer)

    def _install_in_bfloat16(self, optimizer: Any) -> None:
        """Watch the norm of stage 1 in bfloat16, which DeepSpeed measures in its own step.

        It gets the norm itself, a tensor of one value with that norm, in place of the gradients.
        """
        gradients_of = optimizer.get_grads_for_norm

        def gradients(for_clipping: bool = False) -> Any:
            found = gradients_of(for_clipping=for_clipping)
            if for_clipping:
                return found
            norm = get_global_norm_of_tensors(found[0], optimizer.norm_type, optimizer.mpu)
            return [self._passed([norm], optimizer).reshape(1)], found[1]

        optimizer.get_grads_for_norm = gradients

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> None:
        """Measure and clip the gradients of stage 0, or take them away, so that no update is made."""
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        if not self._is_made(float(norm)):
            for parameter in parameters:
                parameter.grad = None

    def _passed(self, norms: Sequence[Any], optimizer: Any) -> Tensor:
        """The norm of groups with these norms, times the loss scale; infinity where the update is refused."""
        norm: Tensor = combine_grad_norm_groups(norms)
        is_valid = not is_invalid_grad_norm(norm)
        # DeepSpeed's optimizer of stage 1 in bfloat16 has no loss scale.
        scale = getattr(optimizer, "loss_scale", 1.0)
        return norm if self._is_made(float(norm) / scale if is_valid else math.inf) else norm * math.inf

    def _is_made(self, grad_norm: float) -> bool:
        self.grad_norm = grad_norm
        self.is_refused = math.isfinite(grad_norm) and not self._accepts(grad_norm)
        return math.isfinite(grad_norm) and not self.is_refused

"""Gradients of weights in bfloat16, summed over the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from voxtral_dist.distributed.devices import on_device
from voxtral_dist.engine.fsdp2.kernels import Kernels
from voxtral_dist.engine.fsdp2.rounding import add_rounded, random_keys, wrapped
from voxtral_dist.engine.fsdp2.sharding import first_position, local_part


class GradientSums:
    """Sums in bfloat16 that are rounded stochastically: FSDP2's own sums would lose small gradients.

    FSDP2 gives a gradient the precision of its weight, and adds that of the next micro-batch in place. Here each
    gradient is taken away as soon as it is reduced, so there is never more than one unit's beside the sums.
    """

    def __init__(self, parameters: Mapping[nn.Parameter, str], seed: int) -> None:
        """Watch the gradients of those parameters that are in bfloat16, by name."""
        self._names = {one: name for one, name in parameters.items() if one.dtype == torch.bfloat16}
        self._seed = seed
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._num_micro_batches: dict[nn.Parameter, int] = {}
        # Updates so far, a key of the random bits.
        self.num_updates = 0
        self._kernels = Kernels([local_part(one) for one in self._names])
        for parameter in self._names:
            parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Give the parameters their sums as gradients, at the end of a step."""
        for parameter, total in self._sums.items():
            parameter.grad = total
        self._sums, self._num_micro_batches = {}, {}
        self.num_updates += 1

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None, "the hook follows the reduction of a gradient"
        number = self._num_micro_batches.get(parameter, 0)
        self._num_micro_batches[parameter] = number + 1
        if parameter not in self._sums:
            self._sums[parameter] = gradient
        else:
            self._add(parameter, local_part(gradient).reshape(-1), number)

    def _add(self, parameter: nn.Parameter, gradient: Tensor, number: int) -> None:
        name = f"gradient {number} of {self._names[parameter]}"
        (key,) = random_keys(self._seed, self.num_updates, [name])
        total, start, size = local_part(self._sums[parameter]), first_position(parameter), self._kernels.chunk_values
        places = [(*key, wrapped(start + before)) for before in range(0, total.numel(), size)]
        placed = on_device(torch.tensor(places, dtype=torch.int32).view(-1, 3), total.device)
        for part, values, place in zip(
            torch.split(total.view(-1), size), torch.split(gradient, size), placed, strict=False
        ):
            self._kernels(add_rounded)(part, values, place)

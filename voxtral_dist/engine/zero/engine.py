"""DeepSpeed's ZeRO (Rajbhandari et al., arXiv 1910.02054) behind the `Engine` protocol: stages 0 to 3."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import deepspeed
import torch
from torch import Tensor, nn

from voxtral_dist.config import ModelConfig, OptimizerConfig, TrainableConfig
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.distributed.devices import return_freed_memory, return_unused_pinned_memory
from voxtral_dist.distributed.process_settings import pin_large_tensors_exactly
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import CopyTensor, ParameterState, StepUpdate, always, on_cpu
from voxtral_dist.engine.finite import names_not_finite
from voxtral_dist.engine.loss import LossOfMicroBatch
from voxtral_dist.engine.loss_scale import NUM_GOOD, NUM_SKIPPED, SCALE
from voxtral_dist.engine.optim import set_learning_rate
from voxtral_dist.engine.plain_copy import plain_copy
from voxtral_dist.engine.zero.building import fill_model, gather_whole_blocks
from voxtral_dist.engine.zero.initializing import prepare_deepspeed
from voxtral_dist.engine.zero.linear import plain_linear
from voxtral_dist.engine.zero.optimizers import build_optimizer
from voxtral_dist.engine.zero.settings import complete_settings, is_offloaded, is_on_nvme, zero_stage
from voxtral_dist.engine.zero.states import full_shape, master_states
from voxtral_dist.engine.zero.update_gate import UpdateGate
from voxtral_dist.model.encoder import ChunkedEncoder
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.trainable import parameter_table
from voxtral_dist.model.voxtral import DTYPES, TrainedVoxtral, trained_meta_model
from voxtral_dist.model.weights import InitialWeights


class ZeroEngine:
    """A model whose optimizer states (stage 1), gradients too (2), and weights too (3) are sharded over ranks.

    Under stage 0 nothing is sharded.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        trainable: TrainableConfig,
        optimizer_config: OptimizerConfig,
        settings: dict[str, Any],
        seed: int,
        log_mel: LogMel,
        world: World,
        most_windows: int | None = None,
    ) -> None:
        """Build the model of a run, sharded according to DeepSpeed's settings.

        Args:
            model_config: section `model` of the configuration.
            trainable: section `trainable`.
            optimizer_config: section `optimizer`.
            settings: from `read_settings`.
            seed: seed of the initial values of adapters.
            log_mel: see `build_engine`.
            world: all ranks.
            most_windows: see `build_engine`.

        Raises:
            UserError: the configuration, the model and this machine do not fit together.
        """
        model = trained_meta_model(model_config, trainable, DTYPES[model_config.precision])
        self._table = parameter_table(model)
        settings = complete_settings(settings, model_config, optimizer_config, model, world.size)
        self.stage = zero_stage(settings)
        self._has_one_chunk = most_windows is not None and most_windows <= model_config.encoder_windows_per_chunk
        self._model_config = model_config
        self._trainable = trainable
        self._max_grad_norm = optimizer_config.max_grad_norm
        self._world = world
        self._loss = LossOfMicroBatch(log_mel, model_config.loss_chunk_tokens, model_config.label_smoothing)
        # A checkpoint that cannot be read is refused before ranks communicate.
        self._initial = InitialWeights(model_config.path, model, seed, world.device)
        prepare_deepspeed(world.timeout)
        if is_on_nvme(settings):
            return_freed_memory()
        pins_states = _pins_states(settings, world)
        if pins_states:
            pin_large_tensors_exactly()
        fill_model(model, self._initial, settings, world)
        if self.stage == 3:
            gather_whole_blocks(model, encoder_has_one_chunk=self._has_one_chunk)
        self._encoder = ChunkedEncoder(model, model_config.encoder_windows_per_chunk)
        self._optimizer = build_optimizer(optimizer_config, model, settings)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=settings)
        if pins_states:
            # DeepSpeed has moved the weights that were pinned one by one into larger blocks.
            return_unused_pinned_memory()
        self._module: TrainedVoxtral = self._engine.module
        self._states = master_states(self._engine, self._optimizer, self.stage, world, optimizer_config.ema_decay)
        self._num_steps = 0
        self._num_skipped = 0
        self._gate = UpdateGate()
        if self.stage == 0:
            # DeepSpeed could clip too, but does not report the norm.
            self._optimizer.register_step_pre_hook(self._clip)
        else:
            self._gate.install(self._engine.optimizer, self.stage)
        if self._scaler is not None:
            # The caller refuses a norm that is not finite, with a better message.
            self._scaler.raise_error_at_min_scale = False

    def backward(self, batch: MicroBatch, num_target_tokens: int, *, is_last: bool) -> Tensor:
        """See `Engine`. DeepSpeed averages gradients over ranks, hence the factor of the world size."""
        # A clip may be slightly longer than its index says. Blocks that are gathered at once must still run only once.
        self._encoder.num_chunks = 1 if self._has_one_chunk else batch.num_encoder_chunks
        loss_sum = self._loss(self._engine, batch.to(self._world.device))
        self._engine.backward(loss_sum * (self._world.size / num_target_tokens), scale_wrt_gas=False)
        return loss_sum.detach()

    def step(self, learning_rate: float, accepts: Callable[[float], bool] = always) -> StepUpdate:
        """See `Engine`. DeepSpeed skips an update whose gradients are not finite."""
        set_learning_rate(self._optimizer, learning_rate)
        can_scale_less = self._scaler is not None and self._scaler.cur_scale > self._scaler.min_scale
        self._gate.expect(accepts)
        self._engine.step()
        grad_norm = self._gate.grad_norm
        is_made = self._engine.was_step_applied() and math.isfinite(grad_norm) and not self._gate.is_refused
        if is_made and self._states.averages is not None:
            self._states.averages.update()
        self._num_skipped += not is_made
        # With the lowest scale, float16 is not the cause: the caller refuses the norm.
        return StepUpdate(grad_norm, learning_rate, is_skipped=not math.isfinite(grad_norm) and can_scale_less)

    def _clip(self, *_: Any) -> None:
        self._gate.clip([parameter for _, parameter in self._trained()], self._max_grad_norm or math.inf)

    @property
    def _scaler(self) -> Any:
        """DeepSpeed's loss scaler of float16; None in other precisions."""
        return self._engine.optimizer.loss_scaler if self._model_config.precision == "float16" else None

    @contextmanager
    def full_weights(self) -> Iterator[nn.Module]:
        """See `Engine`. Under stage 3 this is a copy, gathered parameter by parameter and freed on exit."""
        if self.stage < 3:
            with self.sharded_weights() as module:
                yield module
        else:
            weights, buffers = self._gathered_parameters(), self._module.named_buffers()
            with plain_copy(self._model_config, self._trainable, weights, buffers) as copy, plain_linear():
                yield copy

    def full_weights_bytes(self) -> int:
        """See `Engine`."""
        if self.stage < 3:
            return 0
        num_values = sum(math.prod(full_shape(parameter)) for parameter in self._module.parameters())
        return num_values * DTYPES[self._model_config.precision].itemsize

    @contextmanager
    def sharded_weights(self) -> Iterator[nn.Module]:
        """See `Engine`."""
        self._module.eval()
        self._encoder.num_chunks = None
        try:
            with plain_linear():
                yield self._module
        finally:
            self._module.train()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """See `Engine`. Averages take the place of the float32 weights, from which the model's are set, and back."""
        if self._states.averages is None:
            yield
            return
        with self._states.averages.in_place_of_weights():
            self._set_model_weights()
            yield
        self._set_model_weights()

    def _set_model_weights(self) -> None:
        """Set the weights that forward passes use from the float32 weights; stage 0 has no others."""
        if self.stage > 0:
            for _, parameter in self._trained():
                self._load_weight(parameter, self._states.whole_weight(parameter))

    def parameter_states(self, copy: CopyTensor = on_cpu) -> Iterator[ParameterState]:
        """See `Engine`."""
        for number, (name, parameter) in enumerate(self._trained()):
            state = self._states.state(name, parameter, number % self._world.size, copy)
            if state is not None:
                yield state

    def load_parameter_states(self, states: Iterator[ParameterState], num_updates: int) -> None:
        """See `Engine`."""
        self._states.create_moments(num_updates)
        self._num_steps = num_updates
        for (name, parameter), state in zip(self._trained(), states, strict=True):
            assert name == state.name, f"states come in the order of parameters, but {state.name} came for {name}"
            self._load_weight(parameter, state.weight)
            self._states.load(parameter, state)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Engine`."""
        return {name: full_shape(parameter) for name, parameter in self._trained()}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                full = self._states.weight(parameter, reader=0)
                weight = None if full is None else full.to("cpu", copy=True)
            elif not parameter.is_floating_point():
                weight = self._initial.unquantized(name) if self._world.is_first else None
            else:
                with self._gathered([parameter]):
                    weight = parameter.detach().to("cpu", torch.float32, copy=True) if self._world.is_first else None
            if weight is not None:
                yield name, weight

    def not_finite(self) -> list[str]:
        """See `Engine`. Under stage 3 a rank looks at its partitions, unless they are on a drive."""
        return names_not_finite((name, self._held(one)) for name, one in self._module.named_parameters())

    def _held(self, parameter: nn.Parameter) -> Tensor:
        """What this rank holds of a parameter, without the unset memory that fills partitions up to equal sizes."""
        partition = getattr(parameter, "ds_tensor", None)
        if partition is None:
            return parameter.detach()
        own = parameter.ds_numel - self._world.rank * partition.numel()  # type: ignore[attr-defined]  # DeepSpeed adds it
        return cast(Tensor, partition.detach().flatten()[: max(0, own)])

    def parameter_table(self) -> list[str]:
        """See `Engine`."""
        return self._table

    def scalars(self) -> dict[str, float]:
        """See `Engine`: the number of skipped steps and, in float16, the loss scale."""
        skipped = {NUM_SKIPPED: float(self._num_skipped)}
        if self._scaler is None:
            return skipped
        good = self._scaler.cur_iter - self._scaler.last_overflow_iter - 1
        return skipped | {SCALE: float(self._scaler.cur_scale), NUM_GOOD: float(good)}

    def load_scalars(self, scalars: dict[str, float]) -> None:
        """See `Engine`. Call it after `load_parameter_states`, which counts skipped steps as updates."""
        self._num_skipped = int(scalars[NUM_SKIPPED])
        self._states.set_num_updates(self._num_steps - self._num_skipped)
        if self._scaler is not None:
            self._scaler.cur_scale = scalars.get(SCALE, self._scaler.cur_scale)
            self._scaler.cur_iter = int(scalars.get(NUM_GOOD, 0))
            self._scaler.last_overflow_iter = -1

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad)

    def _gathered(self, parameters: Sequence[nn.Parameter], modifier_rank: int | None = None) -> Any:
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank, enabled=self.stage == 3)

    def _gathered_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._module.named_parameters():
            with self._gathered([parameter]):
                weight = parameter.detach().to(self._world.device, copy=True)
            yield name, weight

    @torch.no_grad()
    def _load_weight(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """Set the weights that forward passes use, in the model's precision."""
        with self._gathered([parameter], modifier_rank=0):
            if self.stage < 3 or self._world.is_first:
                parameter.copy_(weight)


def _pins_states(settings: dict[str, Any], world: World) -> bool:
    """Whether DeepSpeed keeps states in memory that torch pins, which it does for GPUs only."""
    return world.device.type == "cuda" and is_offloaded(settings)

"""torch's FSDP2 (`fully_shard`; FSDP: Zhao et al., arXiv 2304.11277) behind the `Engine` protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from voxtral_dist.config import Fsdp2Config, ModelConfig, OptimizerConfig, TrainableConfig
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.ema import WeightAverages, average_name
from voxtral_dist.engine.engine import CopyTensor, ParameterState, StepUpdate, always, on_cpu
from voxtral_dist.engine.finite import names_not_finite
from voxtral_dist.engine.fsdp2.block_states import dequantize
from voxtral_dist.engine.fsdp2.dcp_files import read_partitions, stored_names
from voxtral_dist.engine.fsdp2.gradient_sums import GradientSums
from voxtral_dist.engine.fsdp2.moments import ShardedMoments
from voxtral_dist.engine.fsdp2.optimizers import build_optimizer, update
from voxtral_dist.engine.fsdp2.sharding import (
    build_mesh,
    fill_partitions,
    gathered,
    local_part,
    refuse_partial_replicas,
    replica_group,
    rows_of,
    shard_model,
    store_in_bfloat16,
    with_local,
)
from voxtral_dist.engine.loss import LossOfMicroBatch
from voxtral_dist.engine.loss_scale import NUM_SKIPPED, LossScale
from voxtral_dist.engine.optim import set_learning_rate
from voxtral_dist.engine.plain_copy import plain_copy
from voxtral_dist.errors import UserError
from voxtral_dist.model.encoder import ChunkedEncoder
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.trainable import parameter_table
from voxtral_dist.model.voxtral import DTYPES, initialize_buffers, trained_meta_model
from voxtral_dist.model.weights import InitialWeights

# As in torch.nn.utils.clip_grad_norm_.
_CLIPPING_EPSILON = 1e-6


def check_fsdp2(model: ModelConfig, optimizer: OptimizerConfig, settings: Fsdp2Config, world_size: int | None) -> None:
    """Refuse what FSDP2 does not support; `world_size` is None if it is not known yet.

    Raises:
        UserError: the optimizer needs full matrices or plain tensors, weights in bfloat16 are to be averaged or to be
            computed with in float16, or replicas do not divide the ranks evenly.
    """
    if optimizer.algorithm == "muon":
        raise UserError(
            "`optimizer.algorithm` must be `adamw` or `adamw_8bit` with `engine.fsdp2`, but is `muon` instead, which "
            "does not work on sharded parameters: choose one of them, or `engine.deepspeed`."
        )
    if not optimizer.master_weights and model.precision == "float16":
        raise UserError(
            "`optimizer.master_weights: false` stores weights in bfloat16, which float16 cannot represent: set "
            "`model.precision` to bfloat16 or float32, or keep master weights."
        )
    if not optimizer.master_weights and optimizer.ema_decay is not None:
        raise UserError(
            "`optimizer.ema_decay` needs float32 weights, because averages change places with them in evaluations: "
            "remove it, or keep `optimizer.master_weights`."
        )
    if world_size is not None:
        refuse_partial_replicas(settings, world_size)


class Fsdp2Engine:
    """A model whose weights, gradients and optimizer states are sharded over ranks; weights are gathered per block."""

    def __init__(
        self,
        model_config: ModelConfig,
        trainable: TrainableConfig,
        optimizer_config: OptimizerConfig,
        settings: Fsdp2Config,
        seed: int,
        log_mel: LogMel,
        world: World,
    ) -> None:
        """Build the model of a run; no rank ever holds more than its own partition of the weights.

        Args:
            model_config: section `model` of the configuration.
            trainable: section `trainable`.
            optimizer_config: section `optimizer`.
            settings: section `engine.fsdp2`.
            seed: seed of the initial values of adapters.
            log_mel: see `build_engine`.
            world: all ranks.

        Raises:
            UserError: the configuration, the model and this machine do not fit together.
        """
        self._model_config = model_config
        self._trainable = trainable
        self._max_grad_norm = optimizer_config.max_grad_norm
        self._world = world
        self._loss = LossOfMicroBatch(log_mel, model_config.loss_chunk_tokens, model_config.label_smoothing)
        self._mesh = build_mesh(world, settings.ranks_per_replica)
        # Accumulating over micro-batches in bfloat16 would lose small gradients. With that precision, gradients are
        # reduced over replicas after every micro-batch, and accumulated in float32 afterwards.
        self._sums_before_replicas = self._mesh.ndim > 1 and settings.reduce_precision == "float32"
        model = trained_meta_model(model_config, trainable, torch.float32)
        self._table = parameter_table(model)
        initialize_buffers(model, world.device)
        self._initial = InitialWeights(model_config.path, model, seed, world.device)
        if not optimizer_config.master_weights:
            store_in_bfloat16(model)
        shard_model(model, self._mesh, settings, DTYPES[model_config.precision])
        fill_partitions(model, self._initial, torch.device("cpu") if settings.cpu_offload else world.device)
        self._encoder = ChunkedEncoder(model, model_config.encoder_windows_per_chunk)
        self._model = model
        # Collected once, because a gathered block's module has other parameters.
        self._parameters = dict(model.named_parameters())
        self._trained = {name: one for name, one in self._parameters.items() if one.requires_grad}
        self._optimizer = build_optimizer(optimizer_config, model, self._trained, seed)
        self._moments = ShardedMoments(self._optimizer, self._trained)
        named = {one: name for name, one in self._trained.items()}
        self._sums = None if optimizer_config.master_weights else GradientSums(named, seed)
        self._averages: WeightAverages | None = None
        if optimizer_config.ema_decay is not None:
            self._averages = WeightAverages(optimizer_config.ema_decay, self._local_weights)
        self._scale = LossScale() if model_config.precision == "float16" else None
        self._num_skipped = 0

    def backward(self, batch: MicroBatch, num_target_tokens: int, *, is_last: bool) -> Tensor:
        """See `Engine`. FSDP2 averages gradients over ranks, hence the factor of the world size.

        Gradients are reduced to partitions after every micro-batch. Deferring that to the last micro-batch
        (`set_requires_gradient_sync`) would communicate less, but keep full gradients on every rank: 4 bytes per
        parameter, where all sharded state takes 16 bytes per parameter divided by the number of ranks. The reduction
        over replicas is deferred, because it works on partitions.
        """
        if self._sums_before_replicas:
            self._model.set_requires_all_reduce(is_last)
        self._encoder.num_chunks = batch.num_encoder_chunks
        loss_sum = self._loss(self._model, batch.to(self._world.device))
        factor = self._loss_factor * self._world.size / num_target_tokens
        (loss_sum * factor).backward()  # type: ignore[no-untyped-call]
        return loss_sum.detach()

    @torch.no_grad()
    def step(self, learning_rate: float, accepts: Callable[[float], bool] = always) -> StepUpdate:
        """See `Engine`."""
        if self._sums is not None:
            self._sums.finish()
        gradients = [local_part(one.grad) for one in self._trained.values() if one.grad is not None]
        scale = self._loss_factor
        grad_norm = self._norm_over_ranks(gradients) / scale
        is_finite = math.isfinite(grad_norm)
        is_made = is_finite and accepts(grad_norm)
        if is_made:
            set_learning_rate(self._optimizer, learning_rate)
            update(self._optimizer, gradients, _clipping_factor(grad_norm, self._max_grad_norm) / scale)
            if self._averages is not None:
                self._averages.update()
        self._optimizer.zero_grad()
        is_skipped = not is_finite and self._scale is not None and not self._scale.is_exhausted
        self._num_skipped += not is_made
        if self._scale is not None:
            self._scale.update(is_finite)
        return StepUpdate(grad_norm, learning_rate, is_skipped)

    @contextmanager
    def full_weights(self) -> Iterator[nn.Module]:
        """See `Engine`. This is a copy, gathered parameter by parameter and freed on exit."""
        dtype = DTYPES[self._model_config.precision]
        full = ((name, gathered(one, dtype, self._world.device)) for name, one in self._parameters.items())
        with plain_copy(self._model_config, self._trainable, full, self._model.named_buffers()) as copy:
            yield copy

    def full_weights_bytes(self) -> int:
        """See `Engine`."""
        size = DTYPES[self._model_config.precision].itemsize
        return sum(one.numel() * (size if one.is_floating_point() else 1) for one in self._parameters.values())

    @contextmanager
    def sharded_weights(self) -> Iterator[nn.Module]:
        """See `Engine`."""
        self._model.eval()
        try:
            yield self._model
        finally:
            self._model.train()
            # Some modules stay gathered for a backward pass, which does not follow.
            for module in self._model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """See `Engine`. Nothing is communicated: gathering weights gathers averages meanwhile."""
        with self._averages.in_place_of_weights() if self._averages else nullcontext():
            yield

    def parameter_states(self, copy: CopyTensor = on_cpu) -> Iterator[ParameterState]:
        """See `Engine`."""
        averages = self._sharded_averages()
        for number, (name, parameter) in enumerate(self._trained.items()):
            reader = number % self._world.size
            average = self._full(averages[name], reader) if averages else None
            weight = self._full(parameter, reader)
            moments = {key: self._full(one, reader, one.dtype) for key, one in self._moments.of(parameter).items()}
            if weight is not None:
                whole = dequantize({key: one for key, one in moments.items() if one is not None})
                yield ParameterState(
                    name,
                    copy((name, "weight"), weight),
                    {key: copy((name, key), one) for key, one in whole.items()},
                    None if average is None else copy((name, "average"), average),
                )

    @torch.no_grad()
    def load_parameter_states(self, states: Iterator[ParameterState], num_updates: int) -> None:
        """See `Engine`."""
        self._set_updates(num_updates)
        averages = self._sharded_averages()
        for (name, parameter), state in zip(self._trained.items(), states, strict=True):
            assert name == state.name, f"states come in the order of parameters, but {state.name} came for {name}"
            rows = rows_of(parameter)
            local_part(parameter).copy_(state.weight[rows])
            self._moments.set_rows(parameter, {key: moment[rows] for key, moment in state.moments.items()})
            if averages:
                average = state.weight if state.average is None else state.average
                local_part(averages[name]).copy_(average[rows])

    def partitions(self) -> dict[str, Tensor]:
        """See `DistributedCheckpointing`. Weights and moments are as they are, quantized ones with scales."""
        partitions = self._weights() | self._named_averages()
        for name, parameter in self._trained.items():
            partitions |= {f"{name}//{key}": moment for key, moment in self._moments.of(parameter).items()}
        return partitions

    @torch.no_grad()
    def load_partitions(self, folder: Path, num_updates: int) -> None:
        """See `DistributedCheckpointing`."""
        self._set_updates(num_updates)
        stored = stored_names(folder)
        read_partitions(self._weights(), folder)
        self._moments.read(folder, stored)
        if self._averages is not None:
            self._averages.restart()
            read_partitions({key: one for key, one in self._named_averages().items() if key in stored}, folder)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Engine`."""
        return {name: tuple(parameter.shape) for name, parameter in self._trained.items()}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        for name, parameter in self._parameters.items():
            if parameter.is_floating_point():
                weight = self._full(parameter, reader=0)
            else:
                weight = self._initial.unquantized(name) if self._world.is_first else None
            if weight is not None:
                yield name, weight

    def not_finite(self) -> list[str]:
        """See `Engine`."""
        return names_not_finite((name, local_part(one.detach())) for name, one in self._parameters.items())

    def parameter_table(self) -> list[str]:
        """See `Engine`."""
        return self._table

    def scalars(self) -> dict[str, float]:
        """See `Engine`: the number of skipped steps and, in float16, the loss scale."""
        return {NUM_SKIPPED: float(self._num_skipped), **(self._scale.scalars() if self._scale else {})}

    def load_scalars(self, scalars: dict[str, float]) -> None:
        """See `Engine`. Call it after `load_parameter_states`, which counts skipped steps as updates."""
        self._num_skipped = int(scalars[NUM_SKIPPED])
        self._moments.skip(self._num_skipped)
        if self._scale is not None:
            self._scale.load_scalars(scalars)

    @property
    def _loss_factor(self) -> float:
        """What the loss is multiplied by before, and gradients are divided by after the backward pass.

        The loss scale of float16. In float8 the inverse of the number of ranks, by which `backward` multiplies: so
        gradients are rounded alike on any number of ranks.
        """
        if self._scale is not None:
            return self._scale.value
        return 1.0 if self._model_config.float8 is None else 1.0 / self._world.size

    def _weights(self) -> dict[str, Tensor]:
        """Sharded weights by name, which share memory with the engine's own."""
        return {name: parameter.detach() for name, parameter in self._trained.items()}

    def _set_updates(self, num_updates: int) -> None:
        self._moments.set_zero(num_updates)
        if self._sums is not None:
            self._sums.num_updates = num_updates

    def _local_weights(self) -> list[Tensor]:
        """This rank's rows of the trained weights."""
        return [local_part(parameter.detach()) for parameter in self._trained.values()]

    def _sharded_averages(self) -> dict[str, Tensor]:
        """The sharded averages by the names of their weights, which share memory with the engine's; empty without."""
        if self._averages is None:
            return {}
        own = zip(self._trained.items(), self._averages.tensors, strict=True)
        return {name: with_local(parameter, average) for (name, parameter), average in own}

    def _named_averages(self) -> dict[str, Tensor]:
        """The sharded averages by their names on disk."""
        return {average_name(name): average for name, average in self._sharded_averages().items()}

    def _full(self, value: Tensor, reader: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The full tensor on the CPU of one rank; None on the others, which take part."""
        full = gathered(value, dtype, self._world.device)
        return full.cpu() if self._world.rank == reader else None

    def _norm_over_ranks(self, gradients: list[Tensor]) -> float:
        """The L2 norm of all gradients, from the part on each rank of a replica."""
        norms = [torch.linalg.vector_norm(one, dtype=torch.float32) for one in gradients]
        square = torch.nn.utils.get_total_norm(norms).to(self._world.device, torch.float64).square()
        dist.all_reduce(square, group=replica_group(self._mesh))
        return math.sqrt(float(square))


def _clipping_factor(grad_norm: float, max_grad_norm: float) -> float:
    return min(1.0, max_grad_norm / (grad_norm + _CLIPPING_EPSILON)) if max_grad_norm else 1.0

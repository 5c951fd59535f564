"""DeepSpeed's ZeRO (Rajbhandari et al., arXiv 1910.02054) behind the `Engine` protocol: stages 1, 2 and 3."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from voxtral_dist.config import RunConfig
from voxtral_dist.data.batches import MicroBatch
from voxtral_dist.data.features import LogMel
from voxtral_dist.distributed.collectives import sum_tensor_over_ranks
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.base import ParameterState, StepUpdate
from voxtral_dist.engine.copies import evaluation_copy
from voxtral_dist.engine.encoder import EncoderPasses
from voxtral_dist.engine.loss import LossOfMicroBatch
from voxtral_dist.errors import UserError
from voxtral_dist.model import DTYPES, TrainedVoxtral, initialize_buffers, trained_skeleton
from voxtral_dist.optim import parameter_groups, set_learning_rate
from voxtral_dist.trainable import parameter_table
from voxtral_dist.weights import InitialWeights

_MOMENTS = ("exp_avg", "exp_avg_sq")
_NEVER = 2**31 - 1

# DeepSpeed's keys that say again what `RunConfig` says, and where it says it.
_OURS = {
    "train_batch_size": "train_data.slots_per_step and train_data.max_examples",
    "train_micro_batch_size_per_gpu": "train_data.max_examples",
    "gradient_accumulation_steps": "train_data.slots_per_step",
    "managed_gradient_accumulation": "train_data.slots_per_step",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "gradient_clipping": "optimizer.max_grad_norm",
    "bf16": "model.precision",
    "fp16": "model.precision",
    "data_types": "model.precision",
    "torch_autocast": "model.precision",
    "zero_allow_untested_optimizer": "optimizer",
}


def read_deepspeed_file(path: Path | None) -> dict[str, Any]:
    """DeepSpeed's own settings.

    Raises:
        UserError: no JSON object, a key that belongs to `RunConfig`, or a stage other than 1, 2 and 3.
    """
    assert path is not None, "`engine` names one of its engines"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"`engine.deepspeed`: {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"`engine.deepspeed`: {path} is not valid JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise UserError(f"`engine.deepspeed`: {path} must hold a JSON object.")
    _refuse_what_is_ours(path, settings)
    _check_zero(path, settings.get("zero_optimization", {}))
    return settings


def _refuse_what_is_ours(path: Path, settings: dict[str, Any]) -> None:
    for key in settings:
        if key in _OURS:
            raise UserError(
                f"`engine.deepspeed`: {path} sets `{key}`, which voxtral-dist fills in from `{_OURS[key]}`: remove it "
                "from that file."
            )


def _check_zero(path: Path, zero: object) -> None:
    if not isinstance(zero, dict):
        raise UserError(f"`engine.deepspeed`: `zero_optimization` in {path} must be an object with a `stage`.")
    if zero.get("stage") not in (1, 2, 3):
        raise UserError(
            f"`engine.deepspeed`: `zero_optimization.stage` in {path} must be 1, 2 or 3, but is {zero.get('stage')!r} "
            "instead."
        )
    for key in ("offload_optimizer", "offload_param"):
        offload = zero.get(key, {})
        if not isinstance(offload, dict) or offload.get("device", "none") not in ("none", "cpu"):
            raise UserError(
                f"`engine.deepspeed`: `{key}` in {path} must be an object with the device cpu or none, but is "
                f"{offload} instead: what is offloaded to NVMe would be missing from checkpoints."
            )


def build_extensions(with_offload: bool) -> None:
    """Compile, or find in the cache, what a run on this machine will load."""
    if get_accelerator().device_name() == "cpu":
        get_accelerator().create_op_builder("ShareMemCommBuilder").load()
    if with_offload:
        get_accelerator().create_op_builder("CPUAdamBuilder").load()


def zero_stage(path: Path) -> int:
    """The stage that DeepSpeed's file asks for."""
    return int(read_deepspeed_file(path)["zero_optimization"]["stage"])


class ZeroEngine:
    """A model whose optimizer state (stage 1), gradients (2) and weights (3) are sharded over ranks."""

    def __init__(self, config: RunConfig, log_mel: LogMel, world: World) -> None:
        """Build the model of a run, sharded as DeepSpeed's file says.

        Raises:
            UserError: the configuration, the checkpoint and this machine do not fit together.
        """
        settings = read_deepspeed_file(config.engine.deepspeed)
        self.stage = int(settings["zero_optimization"]["stage"])
        self._config = config
        self._world = world
        self._loss = LossOfMicroBatch(log_mel, config.model.loss_chunk_tokens)
        model = trained_skeleton(config.model, config.trainable, DTYPES[config.model.precision])
        self._table = parameter_table(model)
        initialize_buffers(model, world.device)
        InitialWeights(config.model.path, model, config.seed).fill(model, world.device)
        self._encoder = EncoderPasses(model, config.model.encoder_windows_per_pass)
        self._optimizer = _build_optimizer(config, model, settings, world.device)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._optimizer, config={"steps_per_print": _NEVER} | settings | _filled_in(config)
        )
        self._module: TrainedVoxtral = self._engine.module

    def backward(self, batch: MicroBatch, num_targets: int, *, is_last: bool) -> Tensor:
        """See `Engine`. DeepSpeed averages gradients over ranks, hence the factor of the world size."""
        self._encoder.num_passes = batch.num_encoder_passes
        loss_sum = self._loss(self._engine, batch.to(self._world.device))
        self._engine.backward(loss_sum * (self._world.size / num_targets), scale_wrt_gas=False)
        return loss_sum.detach()

    def step(self, learning_rate: float) -> StepUpdate:
        """See `Engine`."""
        set_learning_rate(self._optimizer, learning_rate)
        self._engine.step()
        return StepUpdate(float(self._engine.get_global_grad_norm()), learning_rate)

    @contextmanager
    def full_weights(self) -> Iterator[nn.Module]:
        """See `Engine`. Under stage 3 a copy is gathered, parameter by parameter, and lives as long as the context."""
        if self.stage < 3:
            self._module.eval()
            self._encoder.num_passes = None
            try:
                yield self._module
            finally:
                self._module.train()
        else:
            yield evaluation_copy(self._config, self._gathered_parameters(), self._module.named_buffers())

    def parameter_states(self) -> Iterator[ParameterState]:
        """See `Engine`."""
        for name, parameter in self._trained():
            moments = {key: self._full_moment(parameter, key) for key in _MOMENTS}
            yield ParameterState(name, _cpu(safe_get_full_fp32_param(parameter)), moments)

    def load_parameter_states(self, states: Iterator[ParameterState], num_updates: int) -> None:
        """See `Engine`."""
        self._create_moments(num_updates)
        load = self._load_stage3 if self.stage == 3 else self._load_stage12
        for (name, parameter), state in zip(self._trained(), states, strict=True):
            assert name == state.name, f"checkpoints keep the order of parameters, but {state.name} came for {name}"
            self._load_weight(parameter, state.weight)
            load(parameter, state.weight, state.moments)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Engine`."""
        return {name: _full_shape(parameter) for name, parameter in self._trained()}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                yield name, _cpu(safe_get_full_fp32_param(parameter))
            else:
                with self._gathered([parameter]):
                    weight = _cpu(parameter)
                yield name, weight

    def parameter_table(self) -> list[str]:
        """See `Engine`."""
        return self._table

    def scalars(self) -> dict[str, float]:
        """See `Engine`."""
        return {}

    def load_scalars(self, scalars: dict[str, float]) -> None:
        """See `Engine`."""

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad)

    def _gathered(self, parameters: Sequence[nn.Parameter], modifier_rank: int | None = None) -> Any:
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank, enabled=self.stage == 3)

    def _gathered_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._module.named_parameters():
            with self._gathered([parameter]):
                weight = parameter.detach().to(self._world.device, copy=True)
            yield name, weight

    def _flat_partitions(self) -> list[Tensor]:
        """This rank's part of the float32 weights, in the pieces that the optimizer updates."""
        if self.stage == 3:
            partitions: list[Tensor] = self._engine.optimizer.fp32_partitioned_groups_flat
            return partitions
        return [partition for group in self._optimizer.param_groups for partition in group["params"]]

    def _full_moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        if not self._optimizer.state:
            # Nothing has been updated yet: DeepSpeed makes the moments at the first step.
            return torch.zeros(_full_shape(parameter))
        if self.stage == 3:
            return _cpu(safe_get_full_optimizer_state(parameter, key))
        # DeepSpeed has the same for stages 1 and 2, but links moments only when it loads or saves its own checkpoints.
        moment = torch.zeros(_full_shape(parameter), device=self._world.device)
        fragment = self._fragment(parameter, key)
        if fragment is not None:
            inside, values = fragment
            moment.view(-1)[inside].copy_(values)
        sum_tensor_over_ranks(moment, self._world)
        return moment.cpu()

    def _fragment(self, parameter: nn.Parameter, key: str) -> tuple[slice, Tensor] | None:
        """Stages 1 and 2: which positions of a flattened parameter this rank updates, and a view of their moments."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed puts it there
        if mapping is None:
            return None
        inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        partition = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
        values = self._optimizer.state[partition][key].narrow(0, flat.start, flat.numel)
        return slice(inside.start, inside.start + inside.numel), values

    def _create_moments(self, num_updates: int) -> None:
        """Give the optimizer the state that it would otherwise make at its first step."""
        is_torch = isinstance(self._optimizer, torch.optim.AdamW)
        for partition in self._flat_partitions():
            # torch's fused AdamW counts on the device of the weights, the plain one on the CPU.
            device = partition.device if self._optimizer.defaults.get("fused") else "cpu"
            state = self._optimizer.state[partition]
            state["step"] = torch.tensor(float(num_updates), device=device) if is_torch else num_updates
            for key in _MOMENTS:
                state[key] = torch.zeros_like(partition)

    @torch.no_grad()
    def _load_weight(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """The weights of forward passes, in the model's precision."""
        with self._gathered([parameter], modifier_rank=0):
            if self.stage < 3 or self._world.is_first:
                parameter.copy_(weight)

    @torch.no_grad()
    def _load_stage12(self, parameter: nn.Parameter, weight: Tensor, moments: dict[str, Tensor]) -> None:
        """Float32 weights and moments: the fragment of the parameter that lies in this rank's flat partition."""
        safe_set_full_fp32_param(parameter, weight)
        for key, moment in moments.items():
            fragment = self._fragment(parameter, key)
            if fragment is not None:
                inside, values = fragment
                values.copy_(moment.flatten()[inside])

    @torch.no_grad()
    def _load_stage3(self, parameter: nn.Parameter, weight: Tensor, moments: dict[str, Tensor]) -> None:
        """Float32 weights and moments: this rank's slice of the flattened parameter, which ZeRO pads at the end."""
        size = safe_get_local_fp32_param(parameter).numel()
        safe_set_local_fp32_param(parameter, _padded_slice(weight, self._world.rank, size))
        for key, moment in moments.items():
            safe_set_local_optimizer_state(parameter, _padded_slice(moment, self._world.rank, size), key)


def _build_optimizer(
    config: RunConfig, model: nn.Module, settings: dict[str, Any], device: torch.device
) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config.optimizer)
    arguments: dict[str, Any] = {
        "lr": config.optimizer.learning_rate,
        "betas": config.optimizer.betas,
        "eps": config.optimizer.epsilon,
    }
    if settings["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu":
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
        return optimizer
    return torch.optim.AdamW(groups, fused=device.type == "cuda", **arguments)


def _filled_in(config: RunConfig) -> dict[str, Any]:
    """What DeepSpeed has to know of our configuration."""
    is_bfloat16 = config.model.precision == "bfloat16"
    return {
        # DeepSpeed wants some number, and never looks at how many examples our micro-batches have.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # We call step() after any number of backward passes: the boundary is ours.
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16": {"enabled": is_bfloat16},
        # Sums over micro-batches lose small gradients in bfloat16.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if is_bfloat16 else {}),
    }


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    # Stage 3 empties parameters and keeps their shape beside them.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _padded_slice(value: Tensor, rank: int, size: int) -> Tensor:
    flat = value.flatten()
    piece = flat[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(piece, (0, size - piece.numel()))

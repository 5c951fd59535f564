"""DeepSpeed's own configuration file: read, checked, and completed by the run's configuration."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from torch import nn

from voxtral_dist.config import (
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    deepspeed_file,
    refuse_missing_deepspeed_file,
)
from voxtral_dist.errors import UserError
from voxtral_dist.text.json_text import parse_json

OFFLOADS = ("offload_optimizer", "offload_param")
_NEVER = 2**31 - 1

# Keys of DeepSpeed's file that would duplicate an option of `RunConfig`, and that option.
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
# The loss scale starts at 2^16, halves after every overflow (by default DeepSpeed tolerates the first one), and doubles
# after 2000 steps without an overflow.
_FLOAT16 = {"initial_scale_power": 16, "hysteresis": 1, "loss_scale_window": 2000}


def read_deepspeed_file(path: Path | None) -> dict[str, Any]:
    """DeepSpeed's settings as the user wrote them.

    Raises:
        UserError: the file is no JSON object, sets a key that `RunConfig` determines, or has an invalid stage or
            offload device.
    """
    assert path is not None, "`engine` names one of its engines"
    refuse_missing_deepspeed_file(path)
    path = deepspeed_file(path)
    try:
        settings = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"`engine.deepspeed`: {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"`engine.deepspeed`: {path} is not valid JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise UserError(f"`engine.deepspeed`: {path} must hold a JSON object.")
    _refuse_duplicates(path, settings)
    _check_zero(path, settings.get("zero_optimization", {}))
    return settings


def nvme_folder(config: EngineConfig, run_dir: Path) -> Path | None:
    """The folder of a run in `nvme_dir`; None without one."""
    if config.nvme_dir is None:
        return None
    return config.nvme_dir / f"voxtral-dist-{zlib.crc32(str(run_dir.resolve()).encode()):08x}"


def read_settings(config: EngineConfig, run_dir: Path) -> dict[str, Any]:
    """DeepSpeed's file, with a folder of this run in `nvme_dir` for each NVMe offload that names no `nvme_path`.

    Raises:
        UserError: see `read_deepspeed_file`.
    """
    settings = read_deepspeed_file(config.deepspeed)
    zero = dict(settings["zero_optimization"])
    folder = nvme_folder(config, run_dir)
    if folder is not None:
        for key in OFFLOADS:
            if offload_device(settings, key) == "nvme":
                zero[key] = {"nvme_path": str(folder)} | zero[key]
    return settings | {"zero_optimization": zero}


def complete_settings(
    settings: dict[str, Any],
    model_config: ModelConfig,
    optimizer_config: OptimizerConfig,
    model: nn.Module,
    world_size: int,
) -> dict[str, Any]:
    """The argument of `deepspeed.initialize`: the user's settings, and what DeepSpeed must know of the configuration.

    Args:
        settings: from `read_settings`.
        model_config: section `model` of the configuration.
        optimizer_config: section `optimizer`.
        model: the model, which may be on the meta device.
        world_size: number of ranks that share the model.
    """
    is_half = model_config.precision != "float32"
    zero = dict(settings["zero_optimization"])
    if offload_device(settings, "offload_param") == "nvme":
        # DeepSpeed's default is smaller than Voxtral's embeddings.
        largest = max(parameter.numel() for parameter in model.parameters())
        zero["offload_param"] = {"buffer_size": -(-largest // world_size)} | zero["offload_param"]
    if optimizer_config.algorithm == "muon":
        # Muon needs gradients of full matrices.
        zero["reduce_scatter"] = False
    return (
        # DeepSpeed's measurement of throughput makes the host wait for the device in every micro-batch and update.
        {"steps_per_print": _NEVER, "timers": {"throughput": {"enabled": False}}}
        | settings
        | {
            "zero_optimization": zero,
            # DeepSpeed requires a number, but does not use it: our micro-batches vary in size.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            # We call step() after any number of backward passes, which sets the accumulation boundary.
            "managed_gradient_accumulation": False,
            # Under stage 0 `ZeroEngine` clips.
            "gradient_clipping": optimizer_config.max_grad_norm if zero["stage"] else 0.0,
            "bf16": {"enabled": model_config.precision == "bfloat16"},
            "fp16": _FLOAT16 | {"enabled": model_config.precision == "float16"},
            # Accumulation over micro-batches in half precision loses small gradients.
            **({"data_types": {"grad_accum_dtype": "fp32"}} if is_half else {}),
        }
    )


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage of DeepSpeed's settings."""
    return int(settings["zero_optimization"]["stage"])


def offload_device(settings: dict[str, Any], key: str) -> str:
    """The device of `offload_optimizer` or `offload_param`: none, cpu or nvme."""
    return str((settings["zero_optimization"].get(key) or {}).get("device", "none"))


def is_offloaded(settings: dict[str, Any]) -> bool:
    """Whether weights or the optimizer's states are kept outside of the device."""
    return any(offload_device(settings, key) != "none" for key in OFFLOADS)


def is_on_nvme(settings: dict[str, Any]) -> bool:
    """Whether anything is offloaded to NVMe."""
    return any(offload_device(settings, key) == "nvme" for key in OFFLOADS)


def _refuse_duplicates(path: Path, settings: dict[str, Any]) -> None:
    for key in settings:
        if key in _OURS:
            raise UserError(
                f"`engine.deepspeed`: {path} sets `{key}`, which voxtral-dist fills in from `{_OURS[key]}`: remove it "
                "from that file."
            )


def _check_zero(path: Path, zero: object) -> None:
    if not isinstance(zero, dict):
        raise UserError(f"`engine.deepspeed`: `zero_optimization` in {path} must be an object with a `stage`.")
    if zero.get("stage") not in (0, 1, 2, 3) or isinstance(zero.get("stage"), bool):
        raise UserError(
            f"`engine.deepspeed`: `zero_optimization.stage` in {path} must be 0, 1, 2 or 3, but is "
            f"{zero.get('stage')!r} instead."
        )
    for key in OFFLOADS:
        offload = zero.get(key) or {}
        if not isinstance(offload, dict) or offload.get("device", "none") not in ("none", "cpu", "nvme"):
            raise UserError(
                f"`engine.deepspeed`: `{key}` in {path} must be an object with the device none, cpu or nvme, but is "
                f"{offload} instead."
            )
        _check_offload_of_stage(path, key, offload.get("device", "none"), zero["stage"])


def _check_offload_of_stage(path: Path, key: str, device: str, stage: int) -> None:
    # DeepSpeed ignores some of these combinations without a warning.
    lowest = 0 if device == "none" else 1 if (key, device) == ("offload_optimizer", "cpu") else 3
    if stage < lowest:
        raise UserError(
            f"`engine.deepspeed`: `{key}` to {device} in {path} needs stage {lowest} or higher, but "
            f"`zero_optimization.stage` is {stage} instead."
        )

"""DeepSpeed's own file: read, completed by what `RunConfig` says, and refused where the two do not go together."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch import nn

from voxtral_dist.config import RunConfig
from voxtral_dist.errors import UserError

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
# The loss is scaled by 2^16 at first, by half of it after each overflow (DeepSpeed's default lets the first one pass),
# and by twice of it after so many steps without.
_FLOAT16 = {"initial_scale_power": 16, "hysteresis": 1, "loss_scale_window": 2000}
_OFFLOADS = ("offload_optimizer", "offload_param")


def read_deepspeed_file(path: Path | None) -> dict[str, Any]:
    """DeepSpeed's own settings.

    Raises:
        UserError: no JSON object, a key that belongs to `RunConfig`, or a stage that there is not.
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


def check_zero(config: RunConfig) -> None:
    """Refuse, before a model is built, what DeepSpeed cannot do on this machine or does not do as we promise.

    Raises:
        UserError: its file is not usable, or an option does not go with it.
    """
    settings = read_deepspeed_file(config.engine.deepspeed)
    _check_by_deepspeed(config.engine.deepspeed, settings)
    _check_model(config, settings)
    if config.optimizer.algorithm == "muon":
        _check_muon(config, settings)
    if is_on_nvme(settings):
        _check_nvme(config, settings)


def complete_settings(config: RunConfig, model: nn.Module, world_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize` gets: the user's file, and what DeepSpeed has to know of our configuration.

    Args:
        config: of the run.
        model: its meta_model.
        world_size: ranks that share the model.
    """
    settings = read_deepspeed_file(config.engine.deepspeed)
    is_half = config.model.precision != "float32"
    zero = _with_nvme_path(config, settings["zero_optimization"])
    if offload_device(settings, "offload_param") == "nvme":
        # DeepSpeed's own default is less than the embeddings of a Voxtral.
        largest = max(parameter.numel() for parameter in model.parameters())
        zero["offload_param"] = {"buffer_size": -(-largest // world_size)} | zero["offload_param"]
    if config.optimizer.algorithm == "muon":
        # Muon needs gradients of whole matrices.
        zero["reduce_scatter"] = False
    return (
        {"steps_per_print": _NEVER}
        | settings
        | {
            "zero_optimization": zero,
            # DeepSpeed wants some number, and never looks at how many examples our micro-batches have.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            # We call step() after any number of backward passes: the boundary is ours.
            "managed_gradient_accumulation": False,
            # Under stage 0 the engine clips by itself.
            "gradient_clipping": config.optimizer.max_grad_norm if zero["stage"] else 0.0,
            "bf16": {"enabled": config.model.precision == "bfloat16"},
            "fp16": _FLOAT16 | {"enabled": config.model.precision == "float16"},
            # Sums over micro-batches lose small gradients in half precision.
            **({"data_types": {"grad_accum_dtype": "fp32"}} if is_half else {}),
        }
    )


def zero_stage(settings: dict[str, Any]) -> int:
    """The stage that DeepSpeed's settings ask for."""
    return int(settings["zero_optimization"]["stage"])


def offload_device(settings: dict[str, Any], key: str) -> str:
    """Where `offload_optimizer` or `offload_param` puts things: none, cpu or nvme."""
    return str((settings["zero_optimization"].get(key) or {}).get("device", "none"))


def is_on_nvme(settings: dict[str, Any]) -> bool:
    """Whether anything is kept on a drive."""
    return any(offload_device(settings, key) == "nvme" for key in _OFFLOADS)


def build_extensions(with_offload: bool, with_nvme: bool) -> None:
    """Compile, or find in the cache, what a run on this machine will load.

    Raises:
        UserError: libaio is missing.
    """
    if get_accelerator().device_name() == "cpu":
        get_accelerator().create_op_builder("ShareMemCommBuilder").load()
    if with_offload or with_nvme:
        get_accelerator().create_op_builder("CPUAdamBuilder").load()
    if with_nvme:
        refuse_without_libaio()
        get_accelerator().create_op_builder("AsyncIOBuilder").load()


def refuse_without_libaio() -> None:
    """Say what DeepSpeed's extension for NVMe lacks, which would be a traceback of a compiler.

    Raises:
        UserError: libaio's header or library is missing.
    """
    if not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible():
        raise UserError(
            "Offloading to NVMe needs libaio with its headers (Debian: `apt install libaio-dev`; elsewhere set CFLAGS "
            "and LDFLAGS to it), then `voxtral-dist doctor --with-nvme` builds DeepSpeed's extension."
        )


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
    if zero.get("stage") not in (0, 1, 2, 3) or isinstance(zero.get("stage"), bool):
        raise UserError(
            f"`engine.deepspeed`: `zero_optimization.stage` in {path} must be 0, 1, 2 or 3, but is "
            f"{zero.get('stage')!r} instead."
        )
    for key in _OFFLOADS:
        offload = zero.get(key) or {}
        if not isinstance(offload, dict) or offload.get("device", "none") not in ("none", "cpu", "nvme"):
            raise UserError(
                f"`engine.deepspeed`: `{key}` in {path} must be an object with the device none, cpu or nvme, but is "
                f"{offload} instead."
            )
        _check_offload_of_stage(path, key, offload.get("device", "none"), zero["stage"])


def _check_offload_of_stage(path: Path, key: str, device: str, stage: int) -> None:
    # DeepSpeed itself ignores some of these in silence.
    lowest = 0 if device == "none" else 1 if (key, device) == ("offload_optimizer", "cpu") else 3
    if stage < lowest:
        raise UserError(
            f"`engine.deepspeed`: `{key}` to {device} in {path} needs the stage {lowest} or higher, but "
            f"`zero_optimization.stage` is {stage} instead."
        )


def _check_by_deepspeed(path: Path | None, settings: dict[str, Any]) -> None:
    """What DeepSpeed itself would refuse by a traceback, later."""
    zero = settings["zero_optimization"]
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in ("zero_optimization", *first["loc"]))
        raise UserError(f"`engine.deepspeed`: `{place}` in {path}: {first['msg']}.") from error
    if zero["stage"] < 2 and zero.get("overlap_comm"):
        raise UserError(
            f"`engine.deepspeed`: `overlap_comm` in {path} needs the stage 2 or 3, because gradients are summed over "
            "ranks once a step under lower ones: remove it."
        )


def _check_model(config: RunConfig, settings: dict[str, Any]) -> None:
    stage = zero_stage(settings)
    if stage == 3 and config.model.compile_blocks:
        raise UserError(
            "`model.compile_blocks` does not go with ZeRO-3, which gathers weights inside of blocks: set it to false, "
            "or choose another stage or FSDP2."
        )
    if stage == 0 and config.model.precision != "float32":
        raise UserError(
            f"`model.precision`: under the stage 0 DeepSpeed sums gradients in {config.model.precision}, over "
            "micro-batches and ranks, and small ones are lost: choose the stage 1, which sums in float32 and needs "
            "less memory, or float32."
        )
    if config.model.precision == "float16" and not get_accelerator().is_fp16_supported():
        raise UserError("`model.precision`: DeepSpeed knows no float16 on this device: choose bfloat16 or float32.")


def _check_muon(config: RunConfig, settings: dict[str, Any]) -> None:
    stage = zero_stage(settings)
    if stage != 3:
        raise UserError(f"`optimizer.algorithm`: muon needs ZeRO-3, but DeepSpeed's file asks for the stage {stage}.")
    if offload_device(settings, "offload_optimizer") != "none":
        raise UserError(
            "`optimizer.algorithm`: muon cannot be offloaded: choose adamw, or take `offload_optimizer` out of "
            "DeepSpeed's file."
        )
    if config.optimizer.max_grad_norm:
        raise UserError(
            "`optimizer.max_grad_norm` must be 0 with muon under ZeRO: DeepSpeed would clip the updates that Muon has "
            "made of gradients, not the gradients."
        )


def _check_nvme(config: RunConfig, settings: dict[str, Any]) -> None:
    zero = settings["zero_optimization"]
    if offload_device(settings, "offload_param") == "nvme" and zero.get("stage3_prefetch_bucket_size") != 0:
        raise UserError(
            f"`engine.deepspeed`: `stage3_prefetch_bucket_size` in {config.engine.deepspeed} must be 0 where weights "
            "are on NVMe, because DeepSpeed would read a weight ahead that it is reading already, and stop."
        )
    for key in _OFFLOADS:
        if offload_device(settings, key) == "nvme":
            folder = _with_nvme_path(config, settings["zero_optimization"])[key].get("nvme_path")
            if folder is None:
                raise UserError(
                    f"`engine.nvme_dir` must name a folder on a local drive, because `{key}` in "
                    f"{config.engine.deepspeed} goes to nvme and names no `nvme_path`."
                )
            _check_writable(Path(folder))
    refuse_without_libaio()


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"`engine.nvme_dir`: {folder} cannot be written: {error.strerror}.") from error


def _with_nvme_path(config: RunConfig, zero: dict[str, Any]) -> dict[str, Any]:
    """`zero_optimization` with our folder where it wants one and names none: each run has its own."""
    completed = dict(zero)
    if config.engine.nvme_dir is not None:
        own = config.engine.nvme_dir / f"voxtral-dist-{zlib.crc32(str(config.run_dir.resolve()).encode()):08x}"
        for key in _OFFLOADS:
            offload = zero.get(key) or {}
            if offload.get("device") == "nvme" and "nvme_path" not in offload:
                completed[key] = offload | {"nvme_path": str(own)}
    return completed

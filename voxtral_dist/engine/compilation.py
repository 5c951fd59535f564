"""Whether blocks are compiled: `model.compile_blocks` for an engine on a device, and what torch.compile needs there."""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.collectives import max_over_ranks
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError

# Triton's kernels need a GPU of this generation (Volta) or newer.
_TRITON_CAPABILITY = (7, 0)
# Triton's own search, without its option to compile in another way.
_C_COMPILERS = ("gcc", "clang")

logger = logging.getLogger(__name__)


def with_chosen_compilation(config: RunConfig, world: World) -> RunConfig:
    """A configuration whose `model.compile_blocks` is true or false; all ranks call it together and agree.

    `auto` compiles where `gains_by_compilation` says so, on GPUs alone, and logs a sentence where something is missing.
    """
    if config.model.compile_blocks != "auto":
        return config
    is_compiled = world.device.type == "cuda" and gains_by_compilation(config)
    if is_compiled:
        missing = missing_for_compilation(world.device)
        if max_over_ranks([int(missing is not None)], world)[0]:
            is_compiled = False
            logger.warning(
                "`model.compile_blocks: auto` compiles nothing, because %s.", missing or "another rank cannot"
            )
    model = config.model.model_copy(update={"compile_blocks": is_compiled})
    return config.model_copy(update={"model": model})


def gains_by_compilation(config: RunConfig) -> bool:
    """Whether compiled blocks are faster on a GPU and possible: under FSDP2 and ZeRO-1 and 2."""
    return _obstacle(config) is None and _stage(config) != 0


def check_compilation(config: RunConfig, device: torch.device | None) -> None:
    """Refuse `model.compile_blocks: true` where torch.compile would fail in the first step, or cost what it may not.

    Args:
        config: the configuration of the run.
        device: of this rank; None where it is not known, as on the machine that checks a configuration.

    Raises:
        UserError: the engine, the adapters or this machine exclude it.
    """
    if config.model.compile_blocks is True:
        obstacle = _obstacle(config) or (device and missing_for_compilation(device))
        if obstacle:
            raise UserError(f"`model.compile_blocks: true` is not possible, because {obstacle}: set it to auto.")
    is_low_memory = config.optimizer.algorithm == "adamw_8bit" or not config.optimizer.master_weights
    if is_low_memory and device is not None and device.type == "cuda":
        missing = missing_for_compilation(device)
        if missing:
            raise UserError(
                "`optimizer.algorithm: adamw_8bit` and `optimizer.master_weights: false` compile their update, but "
                f"{missing}: mend that, or choose adamw with master weights."
            )


def missing_for_compilation(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, as a clause; None if nothing."""
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "the package triton is missing"
        if torch.cuda.get_device_capability(device) < _TRITON_CAPABILITY:
            return f"Triton does not support {torch.cuda.get_device_name(device)}"
    # Triton compiles C at its first use, torch compiles C++ for CPUs.
    has_compiler = _has_c_compiler() if device.type == "cuda" else shutil.which(os.environ.get("CXX", "g++"))
    if not (has_compiler and has_python_header()):
        return (
            f"this machine has no {'C' if device.type == 'cuda' else 'C++'} compiler or no Python.h (Debian: apt "
            "install g++ python3-dev)"
        )
    return None


def has_python_header() -> bool:
    """Whether C extensions of Python can be compiled, as far as Python's header is concerned."""
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def _has_c_compiler() -> bool:
    return bool(os.environ.get("CC")) or any(shutil.which(name) for name in _C_COMPILERS)


def _obstacle(config: RunConfig) -> str | None:
    """Why blocks cannot be compiled, as a clause; None if they can."""
    lora = config.trainable.lora
    if _stage(config) == 3:
        return "ZeRO-3 gathers weights inside of blocks, so that a block is no single graph"
    if lora is not None and lora.use_dora:
        return "`trainable.lora.use_dora` has code in its layers that torch cannot trace"
    if lora is not None and lora.quantized:
        return (
            "torch would compute each matrix of `trainable.lora.quantized` once and keep it for the backward pass, "
            "which takes more memory than quantization saves"
        )
    return None


def _stage(config: RunConfig) -> int | None:
    """DeepSpeed's stage; None under FSDP2."""
    if config.engine.fsdp2 is not None:
        return None
    from voxtral_dist.engine.zero.settings import read_deepspeed_file, zero_stage

    return zero_stage(read_deepspeed_file(config.engine.deepspeed))

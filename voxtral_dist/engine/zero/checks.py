"""Refusals of what DeepSpeed cannot do on this machine, before a model is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from voxtral_dist.config import EngineConfig, ModelConfig, OptimizerConfig, TrainableConfig
from voxtral_dist.engine.zero.extensions import refuse_without_nvme_support
from voxtral_dist.engine.zero.settings import OFFLOADS, is_on_nvme, offload_device, read_settings, zero_stage
from voxtral_dist.errors import UserError


def check_zero(
    model: ModelConfig, trainable: TrainableConfig, optimizer: OptimizerConfig, engine: EngineConfig, run_dir: Path
) -> None:
    """Refuse what DeepSpeed cannot do on this machine, or would do differently from what the configuration says.

    Raises:
        UserError: DeepSpeed's file is invalid, or an option does not work with it.
    """
    settings = read_settings(engine, run_dir)
    _check_by_deepspeed(engine.deepspeed, settings)
    _check_model(model, zero_stage(settings))
    _check_memory_of_optimizer(optimizer)
    _check_quantization(trainable, zero_stage(settings))
    if optimizer.algorithm == "muon":
        _check_muon(optimizer, settings)
    if optimizer.ema_decay is not None and offload_device(settings, "offload_optimizer") == "nvme":
        raise UserError(
            "`optimizer.ema_decay` needs the optimizer's weights in memory, but DeepSpeed's file keeps them on nvme: "
            "set the device of `offload_optimizer` to cpu, or remove `ema_decay`."
        )
    if is_on_nvme(settings):
        _check_nvme(engine.deepspeed, settings)


def _check_by_deepspeed(path: Path | None, settings: dict[str, Any]) -> None:
    """Turn what DeepSpeed would refuse later, by a traceback, into a message."""
    zero = settings["zero_optimization"]
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in ("zero_optimization", *first["loc"]))
        raise UserError(f"`engine.deepspeed`: `{place}` in {path}: {first['msg']}.") from error
    if zero["stage"] < 2 and zero.get("overlap_comm"):
        raise UserError(
            f"`engine.deepspeed`: `overlap_comm` in {path} needs stage 2 or 3, because lower stages sum gradients over "
            "ranks once per step: remove it."
        )


def _check_model(model: ModelConfig, stage: int) -> None:
    if stage == 0 and model.precision != "float32":
        raise UserError(
            f"`model.precision`: under stage 0 DeepSpeed sums gradients over micro-batches and ranks in "
            f"{model.precision}, which loses small ones: choose stage 1, which sums in float32 and needs less memory, "
            "or choose float32."
        )
    if model.precision == "float16" and not get_accelerator().is_fp16_supported():
        raise UserError(
            "`model.precision`: DeepSpeed does not support float16 on this device: choose bfloat16 or float32."
        )
    if model.float8 is not None and stage == 3:
        raise UserError(
            "`model.float8` does not work with ZeRO-3, because torchao's layers would keep each gathered matrix until "
            "the backward pass: choose FSDP2, or a stage below 3."
        )


def _check_memory_of_optimizer(optimizer: OptimizerConfig) -> None:
    if optimizer.algorithm == "adamw_8bit":
        raise UserError(
            "`optimizer.algorithm`: adamw_8bit needs `engine.fsdp2`, because blocks of 8-bit moments would cross "
            "parameters in DeepSpeed's flat partitions: choose adamw, or FSDP2."
        )
    if not optimizer.master_weights:
        raise UserError(
            "`optimizer.master_weights: false` needs `engine.fsdp2`, because DeepSpeed keeps float32 weights: remove "
            "it, or choose FSDP2."
        )


def _check_quantization(trainable: TrainableConfig, stage: int) -> None:
    if stage == 3 and trainable.lora is not None and trainable.lora.quantized:
        raise UserError(
            "`trainable.lora.quantized` does not work with ZeRO-3, which takes weights of one precision only: choose "
            "FSDP2, which shards quantized weights, or another stage."
        )


def _check_muon(optimizer: OptimizerConfig, settings: dict[str, Any]) -> None:
    stage = zero_stage(settings)
    if stage != 3:
        raise UserError(f"`optimizer.algorithm`: muon needs ZeRO-3, but DeepSpeed's file asks for stage {stage}.")
    if offload_device(settings, "offload_optimizer") != "none":
        raise UserError(
            "`optimizer.algorithm`: muon cannot be offloaded: choose adamw, or remove `offload_optimizer` from "
            "DeepSpeed's file."
        )
    if optimizer.max_grad_norm:
        raise UserError(
            "`optimizer.max_grad_norm` must be 0 with muon under ZeRO: DeepSpeed would clip Muon's updates, not the "
            "gradients."
        )


def _check_nvme(path: Path | None, settings: dict[str, Any]) -> None:
    zero = settings["zero_optimization"]
    if offload_device(settings, "offload_param") == "nvme" and zero.get("stage3_prefetch_bucket_size") != 0:
        raise UserError(
            f"`engine.deepspeed`: `stage3_prefetch_bucket_size` in {path} must be 0 with weights on NVMe, because "
            "DeepSpeed would prefetch a weight that it is already reading, and fail."
        )
    for key in OFFLOADS:
        if offload_device(settings, key) == "nvme":
            folder = zero[key].get("nvme_path")
            if folder is None:
                raise UserError(
                    f"`engine.nvme_dir` must name a folder on a local drive, because `{key}` in {path} is offloaded to "
                    "nvme without an `nvme_path`."
                )
            _check_writable(Path(folder))
    refuse_without_nvme_support()


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"`engine.nvme_dir`: {folder} cannot be written: {error.strerror}.") from error

"""The engine that a configuration selects. Only that one is imported, because importing DeepSpeed takes seconds."""

from __future__ import annotations

import torch

from voxtral_dist.config import EngineConfig, RunConfig
from voxtral_dist.distributed.world import World, set_timeouts
from voxtral_dist.engine.compilation import check_compilation, with_chosen_compilation
from voxtral_dist.engine.engine import Engine
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.float8 import refuse_without_hardware, refuse_without_torchao
from voxtral_dist.model.nf4 import refuse_without_bitsandbytes
from voxtral_dist.model.precision import refuse_without_bfloat16


def build_engine(config: RunConfig, log_mel: LogMel, world: World, most_windows: int | None = None) -> Engine:
    """Build the model of a run with its initial weights, sharded over the ranks.

    Args:
        config: the configuration of the run.
        log_mel: computes the model's input features.
        world: all ranks.
        most_windows: the most windows in any micro-batch; None if unknown. If they fit into one chunk of the encoder,
            ZeRO-3 can gather the weights of encoder blocks more cheaply.

    Raises:
        UserError: the configuration, the model and this machine do not fit together.
    """
    check_engine(config, world.size, world.device)
    engine = _engine(with_chosen_compilation(config, world), log_mel, world, most_windows)
    set_timeouts(world.timeout)
    return engine


def _engine(config: RunConfig, log_mel: LogMel, world: World, most_windows: int | None) -> Engine:
    if config.engine.fsdp2 is not None:
        from voxtral_dist.engine.fsdp2.engine import Fsdp2Engine

        return Fsdp2Engine(
            config.model, config.trainable, config.optimizer, config.engine.fsdp2, config.seed, log_mel, world
        )
    from voxtral_dist.engine.zero.engine import ZeroEngine
    from voxtral_dist.engine.zero.settings import read_settings

    settings = read_settings(config.engine, config.run_dir)
    return ZeroEngine(
        config.model, config.trainable, config.optimizer, settings, config.seed, log_mel, world, most_windows
    )


def check_engine(config: RunConfig, world_size: int | None = None, device: torch.device | None = None) -> None:
    """Refuse, before a model is built, a configuration that its engine does not support.

    Args:
        config: the configuration of the run.
        world_size: number of ranks; None if it is not known yet.
        device: of this rank; None if it is not known yet.

    Raises:
        UserError: DeepSpeed's file is invalid, or an option does not work with the engine, on the device, or
            without a package or a compiler.
    """
    if device is not None:
        refuse_without_bfloat16(config.model.precision, device, "set `model.precision: float16`")
    if config.trainable.lora is not None and config.trainable.lora.quantized:
        refuse_without_bitsandbytes()
    if config.model.float8 is not None:
        refuse_without_torchao()
        if device is not None:
            refuse_without_hardware(config.model, device)
    if config.engine.fsdp2 is not None:
        from voxtral_dist.engine.fsdp2.engine import check_fsdp2

        check_fsdp2(config.model, config.optimizer, config.engine.fsdp2, world_size)
    else:
        from voxtral_dist.engine.zero.checks import check_zero

        check_zero(config.model, config.trainable, config.optimizer, config.engine, config.run_dir)
    check_compilation(config, device)


def engine_name(config: EngineConfig) -> str:
    """The engine's name for logs, such as `ZeRO-3` or `FSDP2`."""
    if config.fsdp2 is not None:
        return "FSDP2"
    from voxtral_dist.engine.zero.settings import read_deepspeed_file, zero_stage

    return f"ZeRO-{zero_stage(read_deepspeed_file(config.deepspeed))}"

"""Which engine a configuration asks for. Only that one is imported: DeepSpeed's import takes seconds."""

from __future__ import annotations

from voxtral_dist.config import EngineConfig, RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine
from voxtral_dist.model.features import LogMel


def build_engine(config: RunConfig, log_mel: LogMel, world: World, most_windows: int | None = None) -> Engine:
    """The model of a run with its initial weights, sharded over the ranks.

    Args:
        config: of the run.
        log_mel: computes the features that the model takes.
        world: all ranks.
        most_windows: that a micro-batch can have; None where nobody knows. What takes one pass of the encoder in any
            case is cheaper under ZeRO-3.

    Raises:
        UserError: the configuration, the checkpoint and this machine do not fit together.
    """
    check_engine(config, world.size)
    if config.engine.fsdp2 is not None:
        from voxtral_dist.engine.fsdp2.engine import Fsdp2Engine

        return Fsdp2Engine(config, config.engine.fsdp2, log_mel, world)
    from voxtral_dist.engine.zero.engine import ZeroEngine

    return ZeroEngine(config, log_mel, world, most_windows)


def check_engine(config: RunConfig, world_size: int | None = None) -> None:
    """Refuse, before a model is built, what the engine cannot do: on any number of ranks, where it is not known yet.

    Raises:
        UserError: DeepSpeed's file is not usable, or an option does not go with the engine.
    """
    if config.engine.fsdp2 is not None:
        from voxtral_dist.engine.fsdp2.engine import check_fsdp2

        check_fsdp2(config, config.engine.fsdp2, world_size)
    else:
        from voxtral_dist.engine.zero.settings import check_zero

        check_zero(config)


def engine_name(config: EngineConfig) -> str:
    """For logs: `ZeRO-3`, `FSDP2`."""
    if config.fsdp2 is not None:
        return "FSDP2"
    from voxtral_dist.engine.zero.settings import read_deepspeed_file, zero_stage

    return f"ZeRO-{zero_stage(read_deepspeed_file(config.deepspeed))}"

"""Which engine a configuration asks for."""

from __future__ import annotations

from voxtral_dist.config import EngineConfig, RunConfig
from voxtral_dist.data.features import LogMel
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.base import Engine
from voxtral_dist.engine.zero import ZeroEngine, read_deepspeed_file


def build_engine(config: RunConfig, log_mel: LogMel, world: World) -> Engine:
    """The model of a run with its initial weights, sharded over the ranks.

    Raises:
        UserError: the configuration, the checkpoint and this machine do not fit together.
    """
    check_engine(config)
    return ZeroEngine(config, log_mel, world)


def check_engine(config: RunConfig) -> None:
    """Refuse, before a model is built, what the engine cannot do.

    Raises:
        UserError: DeepSpeed's file is not usable, or an option does not go with the engine.
    """
    read_deepspeed_file(config.engine.deepspeed)


def engine_name(config: EngineConfig) -> str:
    """For logs: `ZeRO-3`, `FSDP2`."""
    return f"ZeRO-{read_deepspeed_file(config.deepspeed)['zero_optimization']['stage']}"

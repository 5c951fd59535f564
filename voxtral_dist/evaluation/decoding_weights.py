"""Whether ranks decode with gathered or with sharded weights: one decision for `voxtral-dist plan` and evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

from torch import nn

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.distributed.collectives import max_over_ranks
from voxtral_dist.distributed.devices import free_memory_bytes
from voxtral_dist.distributed.world import World, ranks_on_node
from voxtral_dist.engine.engine import Engine

# Fraction of the free memory: allocators cannot use all of it, and other processes come and go.
_USABLE = 0.9


def gathers_weights(
    choice: Literal["auto", "gathered", "sharded"], needed_bytes: float, free_bytes: float | None
) -> bool:
    """Whether each rank gathers a copy of sharded weights to decode on its own.

    Args:
        choice: `evaluation.weights`; `auto` gathers them where the memory suffices.
        needed_bytes: for a copy of all weights and for decoding.
        free_bytes: of the rank with the least free memory, before weights are gathered; None where it is not known,
            which is taken to suffice.
    """
    if choice != "auto":
        return choice == "gathered"
    return free_bytes is None or needed_bytes <= _USABLE * free_bytes


def shown_weights(engine: Engine, settings: EvaluationConfig) -> AbstractContextManager[None]:
    """A context in which the engine has the weights that are evaluated and exported: averages, or those of the step."""
    return nullcontext() if settings.ema is False else engine.averaged_weights()


@contextmanager
def decoding_weights(
    engine: Engine, settings: EvaluationConfig, decoding_bytes: int, world: World
) -> Iterator[tuple[nn.Module, bool, str]]:
    """The engine's model in evaluation mode, whether ranks must call it in lockstep, and a line that says why.

    All ranks enter together and get the same answer.

    Args:
        engine: that holds the weights.
        settings: `weights` may ask for gathered or sharded ones.
        decoding_bytes: memory of a rank for decoding, besides weights: see `DecodingMemory`.
        world: all ranks.
    """
    copy_bytes = engine.full_weights_bytes()
    if copy_bytes == 0:
        with engine.full_weights() as model:
            yield model, False, "decoding with the full weights that each rank holds"
        return
    needed_bytes = copy_bytes + decoding_bytes
    free_bytes = -max_over_ranks([-free_memory_bytes(world.device, ranks_on_node(world.size))], world)[0]
    is_gathered = gathers_weights(settings.weights, needed_bytes, free_bytes)
    line = _explanation(settings, is_gathered, needed_bytes, free_bytes)
    with engine.full_weights() if is_gathered else engine.sharded_weights() as model:
        yield model, not is_gathered, line


def _explanation(settings: EvaluationConfig, is_gathered: bool, needed_bytes: int, free_bytes: int) -> str:
    weights = "gathered" if is_gathered else "sharded"
    asked = "" if settings.weights == "auto" else f" (`evaluation.weights: {settings.weights}`)"
    return (
        f"decoding with {weights} weights{asked}: a gathered copy and decoding need {needed_bytes / 1e9:.1f} GB per "
        f"rank, and the fullest rank has {free_bytes / 1e9:.1f} GB free"
    )

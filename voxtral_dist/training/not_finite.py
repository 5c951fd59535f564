"""The end of a run whose loss or gradient is not a finite number, with what is known about the cause."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.distributed.collectives import from_first_rank, gather_on_first
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine
from voxtral_dist.errors import UserError

_NUM_SHOWN = 8


@dataclass(frozen=True)
class _Findings:
    """What one rank knows.

    suspects: samples of micro-batches whose loss is not finite. samples: of all micro-batches. weights: names of
    parameters that are not finite.
    """

    suspects: tuple[str, ...]
    samples: tuple[str, ...]
    weights: tuple[str, ...]


def refuse_loss_not_finite(
    loss: float,
    step: int,
    micro_batches: Sequence[MicroBatch],
    losses: Sequence[Tensor],
    engine: Engine,
    newest_checkpoint: Callable[[], str | None],
    world: World,
) -> None:
    """Refuse a loss that is not finite, before weights change; all ranks call it together.

    Args:
        loss: over all ranks.
        step: number of updates before.
        micro_batches, losses: of this rank.
        engine: whose weights are looked at.
        newest_checkpoint: names the newest checkpoint; only of finite weights are there any.
        world: all ranks.

    Raises:
        UserError: on all ranks alike.
    """
    if math.isfinite(loss):
        return
    guilty = [not math.isfinite(float(one)) for one in losses]
    findings = _Findings(
        suspects=_samples([batch for batch, is_guilty in zip(micro_batches, guilty, strict=True) if is_guilty]),
        samples=_samples(micro_batches),
        weights=tuple(engine.not_finite()),
    )
    raise UserError(
        f"The loss is {loss} at step {step + 1}, so the run ends. {_explained(findings, world)} "
        f"{_checkpoint(newest_checkpoint())}"
    )


def refuse_norm_not_finite(
    grad_norm: float,
    loss: float,
    step: int,
    micro_batches: Sequence[MicroBatch],
    newest_checkpoint: Callable[[], str | None],
    world: World,
) -> None:
    """Refuse a gradient whose norm is not finite, although the loss is; all ranks call it together.

    The arguments are those of `refuse_loss_not_finite`.

    Raises:
        UserError: on all ranks alike.
    """
    if math.isfinite(grad_norm):
        return
    samples = [one for of_rank in gather_on_first(_samples(micro_batches), world) for one in of_rank]
    raise UserError(
        f"The gradient norm is {grad_norm} at step {step + 1}, so the run ends. The loss ({loss:.4g}), inputs and "
        f"weights were finite before. {from_first_rank(_listed('Samples of the step', samples), world)} Lower "
        f"`optimizer.learning_rate`, or lengthen `optimizer.warmup_steps`. {_checkpoint(newest_checkpoint())}"
    )


def _explained(findings: _Findings, world: World) -> str:
    of_ranks = gather_on_first(findings, world)
    weights = sorted({name for one in of_ranks for name in one.weights})
    suspects = [sample for one in of_ranks for sample in one.suspects]
    if weights:
        text = (
            f"{len(weights)} parameters, such as `{weights[0]}`, were not finite before this step, so no sample is the "
            "cause: lower `optimizer.learning_rate`, or lengthen `optimizer.warmup_steps`."
        )
    else:
        samples = suspects or [sample for one in of_ranks for sample in one.samples]
        text = (
            f"The weights were finite, and so is audio, which has 16-bit samples. "
            f"{_listed('Samples of its micro-batches', samples)} Look at them (`voxtral-dist shards show`), lower "
            "`optimizer.learning_rate`, or lengthen `optimizer.warmup_steps`."
        )
    return from_first_rank(text, world)


def _samples(micro_batches: Sequence[MicroBatch]) -> tuple[str, ...]:
    return tuple(
        f"{key} ({seconds:.2f} s)"
        for batch in micro_batches
        for key, seconds in zip(batch.keys, batch.seconds_per_example, strict=True)
        if batch.num_utterances
    )


def _listed(what: str, samples: Sequence[str]) -> str:
    more = f" and {len(samples) - _NUM_SHOWN} more" if len(samples) > _NUM_SHOWN else ""
    return f"{what}: {', '.join(samples[:_NUM_SHOWN])}{more}."


def _checkpoint(newest: str | None) -> str:
    if newest is None:
        return "There is no checkpoint."
    return f"The last finite checkpoint is {newest}, from which the same command resumes."

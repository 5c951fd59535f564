"""Updates that are unusual: what is known about the cause, the event that records it, and the end of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.distributed.collectives import from_first_rank, gather_on_first
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine
from voxtral_dist.errors import UserError
from voxtral_dist.output.counting import counted
from voxtral_dist.training.guards import Judgement

# Samples in a sentence and in an event.
_NUM_SHOWN, _NUM_RECORDED = 8, 100
_LESS = "`optimizer.learning_rate`, or lengthen `optimizer.warmup_steps`."


@dataclass(frozen=True)
class Incident:
    """An unusual update, as all ranks know it.

    step: number of updates before it.
    loss, grad_norm: of the update.
    samples: keys and durations of those that may be the cause: of micro-batches whose loss is not finite, else of the
        whole step.
    weights: names of parameters that were not finite.
    """

    step: int
    judgement: Judgement
    loss: float
    grad_norm: float
    samples: tuple[str, ...]
    weights: tuple[str, ...]

    @property
    def event(self) -> dict[str, Any]:
        """The row of `metrics.jsonl`."""
        return {
            "event": "skipped_update" if self.judgement.is_skipped else "gradient_spike",
            "reason": self.judgement.reason,
            "loss": finite_or_none(self.loss),
            "grad_norm": finite_or_none(self.grad_norm),
            "median_grad_norm": self.judgement.median,
            "samples": self.samples[:_NUM_RECORDED],
            "num_samples": len(self.samples),
        }

    def __str__(self) -> str:
        consequence = "the update was skipped" if self.judgement.is_skipped else "the update was made"
        return f"step {self.step + 1}: {self._what}: {consequence}. {_listed('Samples', self.samples)}"

    def refusal(self, num_in_a_row: int, newest_checkpoint: str | None) -> UserError:
        """The error that ends the run.

        Args:
            num_in_a_row: updates that were skipped, this one included.
            newest_checkpoint: its name; only of finite weights are there any.
        """
        before = f" after {counted(num_in_a_row - 1, 'skipped update')} in a row" if num_in_a_row > 1 else ""
        return UserError(
            f"{self._what[0].upper()}{self._what[1:]} at step {self.step + 1}{before}, so the run ends. "
            f"{self._explanation} {_checkpoint(newest_checkpoint)}"
        )

    @property
    def _what(self) -> str:
        match self.judgement.reason:
            case "loss":
                return f"the loss is {self.loss}"
            case "gradient":
                return f"the gradient norm is {self.grad_norm}"
            case _:
                return f"the gradient norm is {self.grad_norm:.3g}, and its running median {self.judgement.median:.3g}"

    @property
    def _explanation(self) -> str:
        if self.weights:
            return (
                f"{counted(len(self.weights), 'parameter')}, such as `{self.weights[0]}`, had values that were not "
                f"finite before this step, so no sample is the cause: lower {_LESS}"
            )
        if self.judgement.reason == "gradient":
            return (
                f"The loss ({self.loss:.4g}), inputs and weights were finite before. "
                f"{_listed('Samples of the step', self.samples)} Lower {_LESS}"
            )
        return (
            "The weights were finite, and so is audio, which has 16-bit samples. "
            f"{_listed('Samples of its micro-batches', self.samples)} Look at them (`voxtral-dist shards show`), lower "
            f"{_LESS}"
        )


@dataclass(frozen=True)
class _Findings:
    """What one rank knows: samples of micro-batches whose loss is not finite, of all micro-batches, and weights."""

    suspects: tuple[str, ...]
    samples: tuple[str, ...]
    weights: tuple[str, ...]


def investigate(
    judgement: Judgement,
    step: int,
    loss: float,
    grad_norm: float,
    micro_batches: Sequence[MicroBatch],
    losses: Sequence[Tensor],
    engine: Engine,
    world: World,
) -> Incident:
    """Find out what is known about an unusual update; all ranks call it together, and get the same.

    Args:
        judgement: by the guards.
        step: number of updates before it.
        loss, grad_norm: over all ranks.
        micro_batches, losses: of this rank.
        engine: whose weights are looked at where something is not finite.
        world: all ranks.
    """
    is_guilty = [not math.isfinite(float(one)) for one in losses]
    findings = _Findings(
        suspects=_samples([batch for batch, guilty in zip(micro_batches, is_guilty, strict=True) if guilty]),
        samples=_samples(micro_batches),
        weights=() if judgement.reason == "spike" else tuple(engine.not_finite()),
    )
    of_ranks = gather_on_first(findings, world)
    suspects = tuple(sample for one in of_ranks for sample in one.suspects)
    samples = suspects or tuple(sample for one in of_ranks for sample in one.samples)
    weights = tuple(sorted({name for one in of_ranks for name in one.weights}))
    samples, weights = from_first_rank((samples, weights), world)
    return Incident(step, judgement, loss, grad_norm, samples, weights)


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


def finite_or_none(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def _checkpoint(newest: str | None) -> str:
    if newest is None:
        return "There is no checkpoint."
    return f"The last finite checkpoint is {newest}, from which the same command resumes."

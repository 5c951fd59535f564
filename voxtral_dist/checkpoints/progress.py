"""The progress of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GuardState:
    """What the guards of the update remember of the steps before; see `training.guards`.

    num_skipped: updates that they have skipped. num_in_a_row: those of them directly before now. grad_norms: norms of
    the last updates, oldest first, for the running median.
    """

    num_skipped: int = 0
    num_in_a_row: int = 0
    grad_norms: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrainProgress:
    """Totals of a run after `step` updates; `step` is also the index of the next update.

    num_utterances_seen: utterances trained on. num_bad_utterances: utterances skipped as unusable. num_too_long: those
    of the bad utterances that were too long, which count toward no limit. audio_seconds: audio trained on.
    train_seconds: time in training steps, including the wait for data. guards: what they remember.
    """

    step: int = 0
    num_utterances_seen: int = 0
    num_bad_utterances: int = 0
    num_too_long: int = 0
    audio_seconds: float = 0.0
    train_seconds: float = 0.0
    guards: GuardState = GuardState()

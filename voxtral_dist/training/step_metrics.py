"""What one update measures."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class StepMetrics:
    """Measurements of one update over all ranks.

    loss: mean over target tokens, in nats; None where it is not finite.
    num_tokens: positions of the language model without padding.
    model_flops: floating point operations that the update needs; see `model.flops`.
    grad_norm: None where it is not finite, so that the update was skipped.
    step_seconds: duration of the update, with the wait for its data.
    waiting_seconds: the part of it that was spent waiting for data; the maximum over ranks.
    memory_gigabytes: peak memory of a rank until this update, in 10^9 bytes (`devices.peak_memory_bytes`); the maximum
        over ranks.
    num_skipped: updates that the guards have skipped since the start of the run.
    num_divided: micro-batches of a rank that were divided, because memory does not suffice for them.
    """

    loss: float | None
    num_target_tokens: int
    num_tokens: int
    audio_seconds: float
    model_flops: float
    learning_rate: float
    grad_norm: float | None
    step_seconds: float
    waiting_seconds: float
    memory_gigabytes: float
    num_skipped: int = 0
    num_divided: int = 0

    def row(self, peak_flops: float | None) -> dict[str, float | int | None]:
        """The measurements and the rates that follow from them; `peak_flops` of all ranks together, where known."""
        utilization = None if peak_flops is None else self.model_flops / self.step_seconds / peak_flops
        return asdict(self) | {
            "audio_seconds_per_second": self.audio_seconds / self.step_seconds,
            "target_tokens_per_second": self.num_target_tokens / self.step_seconds,
            "tokens_per_second": self.num_tokens / self.step_seconds,
            "model_flops_utilization": utilization,
        }

"""What a user chooses of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from voxtral_dist.reporting.results_folder import Step


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows.

    step: of a run. baseline: a run (its newest step) or a folder of results to compare with. shards: those of test sets
    by name, before the configured ones. num_utterances: of each list. num_clips: of each test set.
    max_audio_megabytes: of all clips together, before base64. speaker_field: None takes that of the scores.
    normalizer: the function of the user that may be run where results were normalized by it.
    """

    step: Step = "newest"
    baseline: Path | None = None
    shards: Mapping[str, str] = field(default_factory=dict)
    num_utterances: int = 20
    num_clips: int = 20
    max_audio_megabytes: float = 20.0
    speaker_field: str | None = None
    normalizer: str | None = None

"""Fields by which utterances are grouped: into slices, and by speaker."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.scoring.utterances import DecodedUtterance

log = logging.getLogger(__name__)

UNKNOWN = "unknown"
# Every test set is sliced by these.
BUILT_IN_SLICES = ("language", "duration")


@dataclass(frozen=True)
class Grouping:
    """The fields that make slices, besides language and duration, and the field that names the speaker."""

    slices: tuple[str, ...] = ()
    speaker_field: str = "speaker"

    @classmethod
    def of(cls, config: EvaluationConfig) -> Grouping:
        """The grouping that a configuration asks for."""
        return cls(config.slices, config.speaker_field)

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields to keep of each utterance."""
        return tuple(dict.fromkeys((*self.slices, self.speaker_field)))

    def unknown_in(self, utterances: Iterable[DecodedUtterance]) -> list[str]:
        """The requested fields that no utterance has. The default speaker field does not count as requested."""
        found = {name for utterance in utterances for name in utterance.fields}
        requested = [name for name in self.slices if name not in BUILT_IN_SLICES]
        if self.speaker_field != Grouping.speaker_field:
            requested.append(self.speaker_field)
        return [name for name in dict.fromkeys(requested) if name not in found]

    def warn_of_unknown(self, name: str, utterances: Iterable[DecodedUtterance]) -> None:
        """Log each requested field that no utterance of the test set `name` has."""
        for field in self.unknown_in(utterances):
            log.warning("No utterance of `%s` has the field `%s` that `slices` or `speaker_field` names.", name, field)

    def speaker(self, utterance: DecodedUtterance) -> str | None:
        """The speaker of an utterance; None where unknown."""
        speaker = field_label(utterance.fields.get(self.speaker_field))
        return None if speaker == UNKNOWN else speaker


def field_label(value: Any) -> str:
    """The name of the slice for a JSON value."""
    if value is None or value == "":
        return UNKNOWN
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)

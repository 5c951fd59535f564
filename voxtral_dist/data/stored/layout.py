"""Where the tar members of an utterance hold its audio, text, language and instruction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Field:
    """A place in an utterance: the suffix of a tar member and, if that member is JSON, a key in it."""

    member: str
    key: str | None = None


@dataclass(frozen=True)
class UtteranceLayout:
    """Where the tar members of each utterance of a shard set hold what.

    audio: the suffix of the audio member; None: each utterance has exactly one member with an audio suffix.
    text: the place of the transcript, or of the answer to the instruction.
    language: the place of the ISO 639-1 code; a string is the language of the whole set; None means unknown.
    instruction: the place of the instruction; a string is the instruction of the whole set; None means transcription.
    """

    audio: str | None = None
    text: Field = field(default=Field("json", "text"))
    language: Field | str | None = field(default=Field("json", "lang"))
    instruction: Field | str | None = None

    def to_json(self) -> dict[str, Any]:
        """The layout as it is stored in the shard table."""
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> UtteranceLayout:
        """The layout that `to_json` stored."""
        return cls(
            audio=table["audio"],
            text=Field(**table["text"]),
            language=_place(table["language"]),
            instruction=_place(table["instruction"]),
        )


def _place(stored: Any) -> Field | str | None:
    return Field(**stored) if isinstance(stored, dict) else stored

"""Transcripts of an evaluation that has not ended: a file beside its results, from which it resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from voxtral_dist.files import write_atomically, write_errors_named
from voxtral_dist.text.json_text import parse_json


class KeptTranscripts:
    """Transcripts by the number of their utterance, on disk as soon as they are known.

    The first line of the file says what was asked of which model; transcripts of another question are not taken.

    Attributes:
        texts: those of this evaluation, earlier ones included.
        num_resumed: how many there were at the start.
    """

    def __init__(self, path: Path, question: Mapping[str, Any]) -> None:
        """Read what an interrupted evaluation left at a path, where it asked the same question."""
        self.path = path
        self._first_line = json.dumps(question, sort_keys=True)
        self.texts = self._read()
        self.num_resumed = len(self.texts)

    def __enter__(self) -> Self:
        lines = [self._first_line, *(_line(*item) for item in self.texts.items())]
        # Without the end of a line that was cut off.
        with write_errors_named("Transcripts", self.path):
            write_atomically(self.path, "".join(f"{line}\n" for line in lines))
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, utterance_id: int, text: str) -> None:
        """Keep a transcript.

        Raises:
            WriteError: the file cannot be written.
        """
        self.texts[utterance_id] = text
        with write_errors_named("Transcripts", self.path):
            self._file.write(f"{_line(utterance_id, text)}\n")

    def remove(self) -> None:
        """Remove the file, because the results are complete."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[int, str]:
        try:
            first, *lines = self.path.read_text(encoding="utf-8").split("\n")
            if first != self._first_line:
                return {}
            # The last piece is empty, or the beginning of a line.
            rows = [parse_json(line) for line in lines[:-1]]
            return {row["utterance_id"]: row["text"] for row in rows}
        except (OSError, ValueError, KeyError, TypeError):
            # Missing, or damaged: everything is asked again.
            return {}


def _line(utterance_id: int, text: str) -> str:
    return json.dumps({"utterance_id": utterance_id, "text": text})

"""What the user says about a corpus."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from voxtral_dist.data.stored.checks import Cause
from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.shards.corpus.fields import FieldNames
from voxtral_dist.shards.corpus.formats import CorpusFormat
from voxtral_dist.shards.corpus.utterances import Line, Refusal, Utterance


@dataclass(frozen=True)
class CorpusOptions:
    """How a corpus is read.

    corpus_format: None guesses it from the name. language: for utterances without one. names: of columns in tables.
    columns: of a table without a header; None: its first row names them. audio_from: the folder, tars or dataset that
    hold the audio; None: beside the corpus. names_only: whether audio keeps its name, and is found later.
    layout: of tars. split, config: of a Hugging Face dataset. instruction: None if texts are transcripts.
    """

    corpus_format: CorpusFormat | None = None
    language: str | None = None
    names: FieldNames = field(default_factory=FieldNames)
    columns: tuple[str, ...] | None = None
    audio_from: str | None = None
    names_only: bool = False
    layout: UtteranceLayout = field(default_factory=UtteranceLayout)
    split: str | None = None
    config: str | None = None
    instruction: Instruction | None = None


@dataclass(frozen=True)
class Instruction:
    """What the texts of a corpus answer: one instruction for all texts, or a column of instructions."""

    text: str | None = None
    column: str | None = None

    def added_to(self, line: Utterance) -> Line:
        """The utterance with its instruction; refused if it has none."""
        if self.column is None:
            return replace(line, instruction=self.text)
        found = line.extra.get(self.column)
        if not isinstance(found, str) or not found.strip():
            message = f"the utterance has no instruction: its field {self.column} is missing or empty"
            return Refusal(line.place, line.key, Cause.NO_INSTRUCTION, message)
        others = {name: value for name, value in line.extra.items() if name != self.column}
        return replace(line, instruction=found, extra=others)

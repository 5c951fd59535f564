"""A corpus of any format as one stream of utterances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from voxtral_dist.data.stored.checks import UnusableError
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.audio_source import is_audio_source, with_audio_of
from voxtral_dist.shards.corpus.fields import checked_language
from voxtral_dist.shards.corpus.importer import CorpusContents, Importer
from voxtral_dist.shards.corpus.importers import importer_for
from voxtral_dist.shards.corpus.options import CorpusOptions, Instruction
from voxtral_dist.shards.corpus.utterances import Line, Utterance, with_unique_keys


@dataclass(frozen=True)
class Corpus:
    """A corpus that can be read from its start any number of times.

    identity: JSON values that are equal for equal corpora. num_lines: upper limit of utterances; None if unknown.
    instruction: what the texts answer; None if they are transcripts. keeps: which lines belong to it; None: all.
    bounds: first line and end of a part, counted before `keeps`; an end of None is that of the corpus.
    """

    identity: dict[str, Any]
    num_lines: int | None
    _read: Callable[[], Iterable[Line]]
    _language: str | None = None
    instruction: Instruction | None = None
    keeps: Callable[[Line], bool] | None = None
    bounds: tuple[int, int | None] = (0, None)

    def lines(self) -> Iterator[Line]:
        """The utterances in the order of the corpus with unique keys, and refusals of unusable ones."""
        # Keys are made unique over the whole corpus: a part has those that it has in one packing of everything.
        for line in islice(with_unique_keys(self._read()), *self.bounds):
            completed = self._completed(line) if isinstance(line, Utterance) else line
            if self.keeps is None or self.keeps(completed):
                yield completed

    def _completed(self, line: Utterance) -> Line:
        """The utterance with the language and instruction of the whole corpus; a transcript is one line."""
        completed = line if line.language is not None else replace(line, language=self._language)
        if self.instruction is not None:
            return self.instruction.added_to(completed)
        return replace(completed, text=_one_line(completed.text))


def open_corpus(source: str, options: CorpusOptions) -> Corpus:
    """Open the corpus at a path, URL, pattern or name.

    Raises:
        UserError: it does not exist, or is not of its format.
    """
    importer = importer_for(source, options.corpus_format)
    contents = _opened(importer, source, options)
    identity = {"source": source, "format": importer.format} | contents.identity
    for name in ("columns", "audio_from"):
        if (value := getattr(options, name)) is not None:
            identity[name] = value
    if options.instruction is not None:
        identity["instruction"] = asdict(options.instruction)
    return Corpus(identity, contents.num_lines, contents.read, default_language(options.language), options.instruction)


def _opened(importer: Importer, source: str, options: CorpusOptions) -> CorpusContents:
    place = options.audio_from
    if place is None or importer.finds_audio or (importer.is_labels and not is_audio_source(place)):
        return importer.open(source, options)
    if not importer.is_labels:
        raise UserError(
            f"`--audio-from` says where the audio is that a manifest names, but {source} holds its audio: omit it."
        )
    return with_audio_of(importer.open(source, replace(options, audio_from=None, names_only=True)), options)


def default_language(language: str | None) -> str | None:
    """The ISO 639-1 code of `--language`.

    Raises:
        UserError: the language is unknown.
    """
    try:
        return checked_language(language)
    except UnusableError as error:
        raise UserError(f"`--language` {error}.") from error


def _one_line(text: str) -> str:
    """A text with spaces in place of its line breaks."""
    lines = text.splitlines()
    return text if len(lines) == 1 and lines[0] == text else " ".join(line.strip() for line in lines if line.strip())

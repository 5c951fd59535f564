"""A list of words and phrases, found in texts whatever their case and the punctuation around them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from voxtral_dist.errors import UserError
from voxtral_dist.text.steps import even_spaces, fold


@dataclass(frozen=True)
class Occurrence:
    """An entry in a text: its number, and the words that it takes, from `start` to `end` (exclusive)."""

    entry: int
    start: int
    end: int


class WordList:
    """Words and phrases, found in texts whatever their case and the punctuation around them."""

    def __init__(self, entries: Sequence[str]) -> None:
        """A list; entries that fold to nothing or to an earlier one are dropped."""
        by_words: dict[tuple[str, ...], str] = {}
        for entry in entries:
            words = tuple(fold(entry).split())
            if words:
                by_words.setdefault(words, even_spaces(entry))
        self.entries = tuple(by_words.values())
        self._numbers = {words: number for number, words in enumerate(by_words)}
        self._lengths = sorted({len(words) for words in by_words}, reverse=True)

    @classmethod
    def read(cls, path: Path, setting: str) -> WordList:
        """The list in a text file, a word or a phrase in each line.

        Args:
            path: the file.
            setting: what names it in the configuration, for the sentence of an error.

        Raises:
            UserError: the file cannot be read, or holds no words.
        """
        try:
            words = cls(path.read_text(encoding="utf-8-sig").splitlines())
        except OSError as error:
            raise UserError(f"`{setting}`: {path} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise UserError(f"`{setting}`: {path} is not UTF-8 ({error.reason}).") from error
        if not words.entries:
            raise UserError(f"`{setting}`: {path} holds no words: it needs one in each line.")
        return words

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same entries in the same order."""
        return hashlib.sha256("\n".join(self.entries).encode()).hexdigest()

    def find(self, words: Sequence[str]) -> list[Occurrence]:
        """The entries in a folded text, from left to right; of those that begin at a word, the longest."""
        found: list[Occurrence] = []
        start = 0
        while start < len(words):
            here = next(self._occurrences_at(words, start), None)
            if here is not None:
                found.append(here)
            start = here.end if here is not None else start + 1
        return found

    def entries_in(self, text: str) -> list[int]:
        """The numbers of the entries that `find` finds in a text, each once."""
        return list(dict.fromkeys(occurrence.entry for occurrence in self.find(fold(text).split())))

    def all_entries_in(self, text: str) -> set[int]:
        """The numbers of all entries in a text, those inside of others too."""
        words = fold(text).split()
        return {found.entry for start in range(len(words)) for found in self._occurrences_at(words, start)}

    def _occurrences_at(self, words: Sequence[str], start: int) -> Iterator[Occurrence]:
        """The entries that begin at a word, the longest first."""
        for length in self._lengths:
            end = start + length
            entry = self._numbers.get(tuple(words[start:end])) if end <= len(words) else None
            if entry is not None:
                yield Occurrence(entry, start, end)

"""A list of words and phrases that is searched for in texts, ignoring case and punctuation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from voxtral_dist.errors import UserError
from voxtral_dist.text.steps import collapse_spaces, fold


@dataclass(frozen=True)
class Occurrence:
    """An entry of a list in a text: its number, and its words in the text from `start` to `end` (exclusive)."""

    entry: int
    start: int
    end: int


class WordList:
    """Words and phrases to find in texts, ignoring case and punctuation."""

    def __init__(self, entries: Sequence[str]) -> None:
        """Make a list of `entries`; those that fold to nothing or to an earlier one are dropped."""
        by_words: dict[tuple[str, ...], str] = {}
        for entry in entries:
            words = tuple(fold(entry).split())
            if words:
                by_words.setdefault(words, collapse_spaces(entry))
        self.entries = tuple(by_words.values())
        self._numbers = {words: number for number, words in enumerate(by_words)}
        self._lengths = sorted({len(words) for words in by_words}, reverse=True)

    @classmethod
    def read(cls, path: Path, setting: str) -> WordList:
        """Read a list from a text file with one word or phrase per line.

        Args:
            path: the file.
            setting: the name of its field in the configuration, for error messages.

        Raises:
            UserError: the file cannot be read, or contains no words.
        """
        try:
            words = cls(path.read_text(encoding="utf-8-sig").splitlines())
        except OSError as error:
            raise UserError(f"`{setting}`: {path} cannot be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise UserError(f"`{setting}`: {path} is not UTF-8 ({error.reason}). Save it as UTF-8.") from error
        if not words.entries:
            raise UserError(f"`{setting}`: {path} contains no words. Write one word or phrase per line.")
        return words

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the entries in their order."""
        return hashlib.sha256("\n".join(self.entries).encode()).hexdigest()

    def find(self, words: Sequence[str]) -> list[Occurrence]:
        """The entries in the words of a folded text, from left to right: the longest at each word, without overlaps."""
        found: list[Occurrence] = []
        start = 0
        while start < len(words):
            here = next(self._occurrences_at(words, start), None)
            if here is not None:
                found.append(here)
            start = here.end if here is not None else start + 1
        return found

    def entries_in(self, text: str) -> list[int]:
        """The numbers of the entries that `find` finds in a text, without repetitions."""
        return list(dict.fromkeys(occurrence.entry for occurrence in self.find(fold(text).split())))

    def all_entries_in(self, text: str) -> set[int]:
        """The numbers of all entries in a text, including those inside others."""
        words = fold(text).split()
        return {found.entry for start in range(len(words)) for found in self._occurrences_at(words, start)}

    def _occurrences_at(self, words: Sequence[str], start: int) -> Iterator[Occurrence]:
        """The entries that start at a word, longest first."""
        for length in self._lengths:
            end = start + length
            entry = self._numbers.get(tuple(words[start:end])) if end <= len(words) else None
            if entry is not None:
                yield Occurrence(entry, start, end)

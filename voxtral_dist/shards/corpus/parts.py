"""Parts of a corpus that are packed on several machines: consecutive lines, equally many in each."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from voxtral_dist.shards.corpus.corpus import Corpus

_PART = re.compile(r"(\d+)/(\d+)")
# More files than a folder should have: each part has a folder of its own until the merge.
_MOST_PARTS = 10_000


@dataclass(frozen=True)
class CorpusPart:
    """The part `number`, from 1, of `count` parts."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def name(self) -> str:
        """The part in names of files, which sort in the order of the parts: `03-of-32`."""
        return f"{self.number:0{len(str(self.count))}d}-of-{self.count}"

    def bounds(self, num_lines: int) -> tuple[int, int | None]:
        """First line and end of the part; the last part has no end, since `num_lines` may be an estimate."""
        end = None if self.number == self.count else self.number * num_lines // self.count
        return (self.number - 1) * num_lines // self.count, end


def parse_part(text: str) -> CorpusPart:
    """The part that `3/32` names.

    Raises:
        ValueError: the text is of another form, or names no part.
    """
    matched = _PART.fullmatch(text)
    if matched is None or not 1 <= int(matched[1]) <= int(matched[2]) <= _MOST_PARTS:
        raise ValueError(f"must be a part from 1, such as 3/32, of at most {_MOST_PARTS}, but is {text!r} instead")
    return CorpusPart(int(matched[1]), int(matched[2]))


def part_of(corpus: Corpus, part: CorpusPart, num_lines: int) -> Corpus:
    """The lines of one part; those that a division holds out are counted, so both sides are cut at equal places."""
    first, end = part.bounds(num_lines)
    return replace(corpus, num_lines=(num_lines if end is None else end) - first, bounds=(first, end))


def count_lines(corpus: Corpus) -> int:
    """The number of lines by which a corpus is cut: as its source says, else the corpus is read once for it."""
    return corpus.num_lines if corpus.num_lines is not None else sum(1 for _ in corpus.lines())

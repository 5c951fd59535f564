"""The elements of a JSON array that is a whole file, read without holding all of it."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from voxtral_dist.data.stored.storage import open_regular
from voxtral_dist.errors import first_line
from voxtral_dist.shards.corpus.manifest_lines import LARGEST_LINE_BYTES

_CHUNK_BYTES = 2**20
_STRUCTURE = re.compile(r'["\[\]{},]')
_STRING_END = re.compile(r'["\\]')
_ARRAY_OF_OBJECTS = re.compile(rb"\s*\[\s*\{")


@dataclass(frozen=True)
class ArrayElement:
    """The text of an element and the line on which it begins, from 1. error: why there is no text; None if there is."""

    line: int
    text: str
    error: str | None = None


def begins_array(path: Path) -> bool:
    """Whether a plain or compressed file begins as an array of objects; False if it cannot be read."""
    try:
        with _opened(path) as file:
            head = file.read(_CHUNK_BYTES)
    except (OSError, EOFError, zlib.error):
        return False
    return _ARRAY_OF_OBJECTS.match(head.removeprefix(codecs.BOM_UTF8)) is not None


def array_elements(path: Path) -> Iterator[ArrayElement]:
    """The elements of the array in a file; the last one says if the file ends before the array does.

    Raises:
        OSError: the file cannot be read.
    """
    scan = _Scan()
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    damage = "the array is not closed, so the file may be truncated"
    with _opened(path) as file:
        try:
            while not scan.is_closed and (chunk := file.read(_CHUNK_BYTES)):
                yield from scan.elements(decoder.decode(chunk))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            damage = f"its compressed data is damaged ({first_line(error)})"
    if not scan.is_closed:
        yield ArrayElement(scan.line, "", f"the manifest ends here: {damage}")


def _opened(path: Path) -> BinaryIO:
    plain = open_regular(path)
    return cast(BinaryIO, gzip.GzipFile(fileobj=plain)) if path.suffix == ".gz" else plain


class _Scan:
    """The state between chunks: nesting, whether a string is open, and the parts of an unfinished element."""

    def __init__(self) -> None:
        self.line = 1
        self.is_closed = False
        self._depth = 0
        self._is_in_string = False
        self._skipped = 0
        self._parts: list[str] = []
        self._length = 0

    def elements(self, chunk: str) -> Iterator[ArrayElement]:
        """The elements that end in the next chunk."""
        start = position = 0
        if self._skipped:
            position, self._skipped = 1, 0
        while (found := (_STRING_END if self._is_in_string else _STRUCTURE).search(chunk, position)) is not None:
            position = found.end()
            if self._step(found[0]):
                yield from self._finished(chunk[start : found.start()])
                start = position
                if self.is_closed:
                    return
            elif found[0] == "\\":
                position, self._skipped = position + 1, int(position == len(chunk))
        self._keep(chunk[start:])

    def _step(self, mark: str) -> bool:
        """Follow one mark; whether it ends an element, or opens the array."""
        if self._is_in_string:
            self._is_in_string = mark != '"'
        elif mark == '"':
            self._is_in_string = True
        elif mark in "[{":
            self._depth += 1
            return self._depth == 1
        elif mark in "]}":
            self._depth -= 1
            self.is_closed = self._depth == 0
            return self.is_closed
        return mark == "," and not self._is_in_string and self._depth == 1

    def _keep(self, part: str) -> None:
        self._length += len(part)
        # An element that is too long is only counted.
        if self._length <= LARGEST_LINE_BYTES:
            self._parts.append(part)
        else:
            self.line += part.count("\n")

    def _finished(self, part: str) -> Iterator[ArrayElement]:
        self._keep(part)
        text, is_too_long = "".join(self._parts), self._length > LARGEST_LINE_BYTES
        self._parts, self._length = [], 0
        blank = len(text) - len(text.lstrip())
        line = self.line + text.count("\n", 0, blank)
        self.line += text.count("\n")
        if is_too_long:
            yield ArrayElement(line, "", f"the element is too long: it has more than {LARGEST_LINE_BYTES >> 20} MiB")
        elif text.strip():
            yield ArrayElement(line, text)

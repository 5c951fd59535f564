"""The lines of a manifest, read so that none of them ends the reading."""

from __future__ import annotations

import codecs
import csv
import gzip
import zlib
from collections import deque
from pathlib import Path
from typing import BinaryIO, cast

from voxtral_dist.data.stored.placeholders import HEAD_BYTES, placeholder_reason
from voxtral_dist.data.stored.storage import open_regular
from voxtral_dist.errors import UserError, first_line

# Far more than any cut of Lhotse; a compressed line of zeros may have gigabytes.
LARGEST_LINE_BYTES = 2**24


class LineTooLongError(csv.Error):
    """A line has more than `LARGEST_LINE_BYTES`. Iteration continues with the next one."""


class ManifestLines:
    """The lines of a plain or compressed manifest as text, with their ends.

    Bytes that are not UTF-8 become surrogates, so that only what they belong to is unusable.

    number: of the line read last, from 1.
    damage: why the file ended before its end; None if it did not.
    """

    def __init__(self, path: Path) -> None:
        """Open a manifest.

        Raises:
            UserError: it cannot be opened.
        """
        self.number = 0
        self.damage: str | None = None
        self._path = path
        self._parts: deque[bytes] = deque()
        try:
            plain = open_regular(path)
            reason = placeholder_reason(plain.read(HEAD_BYTES))
            if reason is not None:
                plain.close()
                raise UserError(f"The manifest {path} {reason}.")
            plain.seek(0)
        except OSError as error:
            raise self._unreadable(error) from error
        self._file = cast(BinaryIO, gzip.GzipFile(fileobj=plain)) if path.suffix == ".gz" else plain

    def __iter__(self) -> ManifestLines:
        return self

    def __next__(self) -> str:
        """The next line.

        Raises:
            LineTooLongError: it is too long.
            UserError: the disk fails.
        """
        if not self._parts:
            line = self._read()
            # Some spreadsheets end lines by a carriage return only.
            self._parts.extend(
                line.removeprefix(codecs.BOM_UTF8 if self.number == 0 else b"").splitlines(keepends=True)
            )
            if not self._parts:
                raise StopIteration
        self.number += 1
        return self._parts.popleft().decode("utf-8", "surrogateescape")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self) -> bytes:
        try:
            line = self._file.readline(LARGEST_LINE_BYTES)
            if len(line) < LARGEST_LINE_BYTES or line.endswith(b"\n"):
                return line
            while line and not line.endswith(b"\n"):
                line = self._file.readline(LARGEST_LINE_BYTES)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            self.damage = f"its compressed data is damaged ({first_line(error)})"
            return b""
        except OSError as error:
            raise self._unreadable(error) from error
        self.number += 1
        raise LineTooLongError(f"it has more than {LARGEST_LINE_BYTES >> 20} MiB")

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(f"The manifest {self._path} cannot be read: {error.strerror or first_line(error)}.")

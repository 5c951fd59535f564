"""Sizes in the header of a WAV file, as a recorder leaves them that was cut off, or a program that writes to a pipe.

libsndfile reads nothing where the header says that there are 0 bytes of samples, and refuses RF64 whose 64-bit size is
not filled in.

Source: Microsoft, "Multimedia Programming Interface and Data Specifications 1.0" (RIFF); EBU Tech 3306 (RF64).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

_CHUNK_HEAD_BYTES = 8
_MAX_CHUNKS = 1000
# Where samples begin in a header that is written anew: RIFF, fmt and data.
_LARGEST_FORMAT_BYTES = 2**16
# Programs that do not know the size write the largest one, less a header or rounded down.
_UNKNOWN_BYTES = range(2**31 - 2**16, 2**32)


@dataclass(frozen=True)
class WavSizes:
    """The place of the samples of a WAV file, as its header says and as it is.

    head: the bytes before the samples. claimed_bytes: of samples; None if the header leaves it open. num_bytes: of the
    samples that are there. is_readable: whether libsndfile reads them all by the header as it is.
    """

    head: bytes
    claimed_bytes: int | None
    num_bytes: int
    format_chunk: bytes
    is_readable: bool

    @property
    def is_cut_off(self) -> bool:
        """Whether samples are missing at the end."""
        return self.claimed_bytes is not None and self.num_bytes < self.claimed_bytes

    @property
    def claimed_seconds(self) -> float | None:
        """Seconds by the header's size and byte rate; None where it leaves either open."""
        byte_rate = int.from_bytes(self.format_chunk[8:12], "little")
        return self.claimed_bytes / byte_rate if self.claimed_bytes is not None and byte_rate else None

    def new_head(self) -> bytes:
        """A header for the samples that are there, which replaces `head`."""
        padded = self.format_chunk + b"\0" * (len(self.format_chunk) % 2)
        rest = b"WAVEfmt " + struct.pack("<I", len(self.format_chunk)) + padded + b"data"
        num_bytes = min(self.num_bytes, 2**32 - 1 - len(rest) - _CHUNK_HEAD_BYTES)
        riff_bytes = len(rest) + 4 + num_bytes
        return b"RIFF" + struct.pack("<I", riff_bytes) + rest + struct.pack("<I", num_bytes)


def read_wav_sizes(file: BinaryIO) -> WavSizes | None:
    """The sizes of a WAV file; None if it is none, or has no format or samples. The file's position changes."""
    total_bytes = file.seek(0, 2)
    file.seek(0)
    riff = file.read(12)
    if riff[:4] not in (b"RIFF", b"RF64", b"BW64") or riff[8:] != b"WAVE":
        return None
    format_chunk, large_bytes = b"", None
    for _ in range(_MAX_CHUNKS):
        name, size = _chunk(file)
        start = file.tell()
        if name == b"data":
            return _sizes(file, start, total_bytes, size, large_bytes, format_chunk) if format_chunk else None
        if size > total_bytes - start:
            return None
        if name == b"fmt ":
            format_chunk = file.read(min(size, _LARGEST_FORMAT_BYTES))
        elif name == b"ds64" and size >= 16:
            large_bytes = struct.unpack("<Q", file.read(16)[8:])[0]
        file.seek(start + size + size % 2)
    return None


def _chunk(file: BinaryIO) -> tuple[bytes, int]:
    """The name and size of the chunk at the position; an empty name at the end."""
    head = file.read(_CHUNK_HEAD_BYTES)
    if len(head) < _CHUNK_HEAD_BYTES:
        return b"", 2**64
    return head[:4], int.from_bytes(head[4:], "little")


def _sizes(
    file: BinaryIO, start: int, total_bytes: int, size: int, large_bytes: int | None, format_chunk: bytes
) -> WavSizes:
    claimed = large_bytes if large_bytes is not None and size == 2**32 - 1 else size
    left = total_bytes - start
    is_open = (
        claimed == 2**64 - 1
        or (claimed in _UNKNOWN_BYTES and claimed > left)
        or (claimed == 0 and not _is_chain(file, start))
    )
    file.seek(0)
    head = file.read(start)
    num_bytes = left if is_open else min(left, claimed)
    # libsndfile knows 2^32 - 1, and reads files that were cut off to their end.
    is_readable = not is_open or (claimed != 0 and large_bytes is None)
    return WavSizes(head, None if is_open else claimed, num_bytes, format_chunk, is_readable)


def _is_chain(file: BinaryIO, position: int) -> bool:
    """Whether chunks lie one after the other from a position to the end of the file, as behind samples that end."""
    total_bytes = file.seek(0, 2)
    for _ in range(_MAX_CHUNKS):
        if position >= total_bytes:
            return True
        file.seek(position)
        name, size = _chunk(file)
        if not name.strip().isalnum() or size > total_bytes - position:
            return False
        position += _CHUNK_HEAD_BYTES + size + size % 2
    return False

"""Frames of MPEG audio (MP3), found by their own headers, and a stream of them whose header states its true length.

libsndfile believes the frame that LAME writes first (`Xing` or `Info`), or estimates the length from the first frames.
It then reads no further: half of two joined files, half of a radio recording of variable bit rate. It also refuses
streams that do not begin with a frame. Players read frame after frame, and skip what is none.

Source: ISO/IEC 11172-3 and 13818-3, section 2.4.1.3 (headers of frames); Gabriel Bouvigne, "MP3 Info Tag rev 1
specifications".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from voxtral_dist.data.stored.checks import Cause, UnusableError

# In kbit/s by index 1 to 14, for (MPEG-1, layer) and (MPEG-2 or 2.5, layer).
_BIT_RATES = {
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_SAMPLING_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_HEADER_BYTES = 4
_MONO = 3
# Of other contents, such as video, by chance no more than two frames follow each other.
_MIN_FRAMES = 3
# Another file that holds a few frames is not taken for MP3.
_MIN_COVERED = 0.8
# Bytes that look like a frame and are none; a file of nothing else would take minutes.
_MAX_MISSES = 2**18
_MAX_TAGS = 100
_TAG_HEADS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")
_FRAMES_AND_BYTES = 3


class _Kind(NamedTuple):
    """What all frames of a stream have in common."""

    version: int
    layer: int
    sampling_rate: int
    is_mono: bool

    @property
    def samples_per_frame(self) -> int:
        if self.layer == 1:
            return 384
        return 576 if self.layer == 3 and self.version != 3 else 1152

    @property
    def side_info_bytes(self) -> int:
        """Bytes of the side information of a frame of layer III."""
        if self.version == 3:
            return 17 if self.is_mono else 32
        return 9 if self.is_mono else 17


class _Header(NamedTuple):
    kind: _Kind
    num_bytes: int
    bit_rate: int


@dataclass(frozen=True)
class Mp3Frames:
    """The frames of an MP3.

    contents: the frames alone, one after the other, without tags and the frame that states the length.
    num_samples: per channel; the sum over all frames. claimed_samples: what its first frame states; None if nothing.
    is_plain: whether decoders that believe headers read all of it.
    """

    kind: _Kind
    contents: bytes
    num_frames: int
    claimed_samples: int | None
    is_plain: bool

    @property
    def num_samples(self) -> int:
        """Samples per channel of all frames."""
        return self.num_frames * self.kind.samples_per_frame

    def with_length(self) -> bytes:
        """The frames after one that states their number and their bytes; of layers I and II, the frames alone."""
        if self.kind.layer != 3:
            return self.contents
        head, offset = _silent_frame(self.contents[:_HEADER_BYTES], self.kind)
        stated = struct.pack(">4sIII", b"Xing", _FRAMES_AND_BYTES, self.num_frames, len(head) + len(self.contents))
        return head[:offset] + stated + head[offset + len(stated) :] + self.contents


def find_mp3_frames(contents: bytes, is_known: bool = False) -> Mp3Frames | None:
    """The frames of an MP3; None if the contents are something else, or of free bit rate.

    Args:
        contents: of a file.
        is_known: whether it is known to be MP3, so that most of it may be something else, such as pictures.

    Raises:
        UnusableError: the sampling rate or the number of channels changes inside, as where two files were joined.
    """
    spans = _frame_spans(contents)
    covered = sum(header.num_bytes for _, header in spans)
    least = 0 if is_known else _MIN_COVERED * (len(contents) - _num_tag_bytes(contents, spans))
    if len(spans) < _MIN_FRAMES or covered < least:
        return None
    claims = [_claimed_frames(contents, start, header) for start, header in spans]
    audio = [span for span, claim in zip(spans, claims, strict=True) if claim is None]
    if not audio:
        return None
    kinds = {header.kind for _, header in audio}
    if len(kinds) > 1:
        raise UnusableError(Cause.UNDECODABLE, "is an MP3 whose sampling rate or number of channels changes inside")
    kind = kinds.pop()
    claimed = claims[0] or None
    ends = [start + header.num_bytes for start, header in spans]
    has_gaps = any(end != start for end, (start, _) in zip(ends, spans[1:], strict=False))
    begins = spans[0][0] == _end_of_id3(contents, 0)
    is_steady = len({header.bit_rate for _, header in audio}) == 1
    knows_length = claimed == len(audio) if claims[0] is not None else is_steady
    return Mp3Frames(
        kind=kind,
        contents=b"".join(contents[start : start + header.num_bytes] for start, header in audio),
        num_frames=len(audio),
        claimed_samples=None if claimed is None else claimed * kind.samples_per_frame,
        is_plain=begins and not has_gaps and knows_length and sum(claim is not None for claim in claims) <= 1,
    )


def _frame_spans(contents: bytes) -> list[tuple[int, _Header]]:
    """The frames with their offsets; a frame counts where another one, a tag or the end follows it."""
    spans: list[tuple[int, _Header]] = []
    position, is_in_step, num_misses = _end_of_id3(contents, 0), False, 0
    while position + _HEADER_BYTES <= len(contents) and num_misses < _MAX_MISSES:
        header = _HEADERS.get(contents[position + 1 : position + 3]) if contents[position] == 0xFF else None
        end = 0
        if header is not None:
            header = _with_channels(header, contents[position + 3])
            end = position + header.num_bytes
        if header is not None and end <= len(contents) and (is_in_step or _is_followed(contents, end, header)):
            spans.append((position, header))
            position, is_in_step = end, _is_followed(contents, end, header)
            continue
        is_in_step, num_misses = False, num_misses + 1
        position = _next_place(contents, position)
    return spans


def _next_place(contents: bytes, position: int) -> int:
    """The next offset that may hold a frame."""
    if contents.startswith(b"ID3", position):
        return max(position + 1, _end_of_id3(contents, position))
    found = contents.find(b"\xff", position + 1)
    tag = contents.find(b"ID3", position + 1, found if found >= 0 else None)
    place = tag if tag >= 0 else found
    return place if place >= 0 else len(contents)


def _is_followed(contents: bytes, end: int, header: _Header) -> bool:
    """Whether a frame of the same kind, a tag or the end of the file begins at an offset."""
    if end >= len(contents) or contents.startswith(_TAG_HEADS, end):
        return True
    other = _HEADERS.get(contents[end + 1 : end + 3]) if contents[end] == 0xFF else None
    return other is not None and other.kind[:3] == header.kind[:3]


def _with_channels(header: _Header, last: int) -> _Header:
    return header._replace(kind=header.kind._replace(is_mono=last >> 6 == _MONO))


def _end_of_id3(contents: bytes, position: int) -> int:
    """The end of the ID3v2 tags at an offset; the offset itself if there are none."""
    for _ in range(_MAX_TAGS):
        if not contents.startswith(b"ID3", position) or position + 10 > len(contents):
            break
        size = 0
        for byte in contents[position + 6 : position + 10]:
            size = size << 7 | byte & 0x7F
        footer = 10 if contents[position + 5] & 0x10 else 0
        position += 10 + size + footer
    return position


def _num_tag_bytes(contents: bytes, spans: list[tuple[int, _Header]]) -> int:
    """Bytes before the first frame and behind the last one, where tags, pictures and padding lie."""
    if not spans:
        return 0
    last, header = spans[-1]
    return spans[0][0] + len(contents) - (last + header.num_bytes)


def _claimed_frames(contents: bytes, start: int, header: _Header) -> int | None:
    """The number of frames that a frame states in place of audio, 0 if it states none; None if it holds audio."""
    if header.kind.layer != 3:
        return None
    place = start + _HEADER_BYTES + header.kind.side_info_bytes
    if contents[place : place + 4] in (b"Xing", b"Info"):
        flags, num_frames = struct.unpack(">II", contents[place + 4 : place + 12].ljust(8, b"\0"))
        return num_frames if flags & 1 else 0
    place = start + _HEADER_BYTES + 32
    if contents[place : place + 4] == b"VBRI":
        return int.from_bytes(contents[place + 14 : place + 18], "big")
    return None


def _silent_frame(first: bytes, kind: _Kind) -> tuple[bytes, int]:
    """A frame of zeros at 128 or 64 kbit/s, without a checksum, and the offset at which a length is stated in it."""
    bit_rate_index = 9 if kind.version == 3 else 8
    rate_index = first[2] >> 2 & 3
    head = bytes([0xFF, first[1] | 1, bit_rate_index << 4 | rate_index << 2, first[3]])
    header = _HEADERS[head[1:3]]
    return head + bytes(header.num_bytes - _HEADER_BYTES), _HEADER_BYTES + kind.side_info_bytes


def _headers() -> dict[bytes, _Header]:
    """The headers of all frames by their second and third byte."""
    headers = {}
    for second in range(0xE0, 0x100):
        version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)
        if version not in _SAMPLING_RATES or layer == 4:
            continue
        for third in range(0x100):
            bit_rate_index, rate_index, padding = third >> 4, third >> 2 & 3, third >> 1 & 1
            if bit_rate_index not in range(1, 15) or rate_index == 3:
                continue
            bit_rate = 1000 * _BIT_RATES[version == 3, layer][bit_rate_index - 1]
            kind = _Kind(version, layer, _SAMPLING_RATES[version][rate_index], False)
            # Layer I counts in slots of 4 bytes, the others in bytes.
            slot = 4 if layer == 1 else 1
            num_slots = kind.samples_per_frame // 8 * bit_rate // kind.sampling_rate // slot + padding
            headers[bytes((second, third))] = _Header(kind, num_slots * slot, bit_rate)
    return headers


_HEADERS = _headers()

"""Audio files as blocks of samples at their own rate: by libsndfile where it reads all of a file, else by FFmpeg.

Headers are repaired where libsndfile would read less than there is: MP3 without a true length, WAV without sizes.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, BinaryIO, Protocol

import soundfile
from numpy.typing import NDArray

from voxtral_dist.data.stored.audio_kinds import media_name, stray_reason
from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.data.stored.media import REMEDY, can_decode_media, opened_media
from voxtral_dist.data.stored.mp3_frames import Mp3Frames, find_mp3_frames
from voxtral_dist.data.stored.placeholders import placeholder_reason
from voxtral_dist.data.stored.wav_sizes import read_wav_sizes

LONGEST_CLIP_SECONDS = 6 * 3600
# From telephones to masters of studios (DXD, 352.8 kHz) and twice that; a damaged header may claim anything.
_RATES = range(4_000, 768_001)
# Decoded at a time, over all channels: more than an utterance of a minute.
_BLOCK_SAMPLES = 2**20
_HEAD_BYTES = 64
_OGG_TAIL_BYTES = 2**17
# Encoders add and remove fractions of a frame.
_LOSS_TOLERANCE_SECONDS = 0.5


class AudioError(UnusableError):
    """The audio of an utterance is unusable. As in `UnusableError`, the message is a predicate."""

    def __init__(self, message: str, cause: Cause = Cause.UNDECODABLE) -> None:
        super().__init__(cause, message)


class AudioSource(Protocol):
    """An open audio file: `SoundFileAudio` and `MediaAudio`."""

    @property
    def sampling_rate(self) -> int:
        """Samples per second and channel, in Hz."""

    @property
    def num_channels(self) -> int:
        """Number of channels."""

    @property
    def num_frames(self) -> int | None:
        """Samples per channel; None if only decoding tells."""

    @property
    def subtype(self) -> str:
        """The name that libsndfile has for the encoding of samples, such as `PCM_16`."""

    @property
    def cut_off(self) -> str | None:
        """What is known of the missing end, as a predicate; complete when all blocks have been read."""

    def blocks(self, dtype: str, start: int = 0, num_frames: int | None = None) -> Iterator[NDArray[Any]]:
        """Samples from `start` on, `(num_frames,)`, or `(num_frames, num_channels)` of several channels. Read once.

        They come in blocks of limited size: memory depends on what a file holds, and not on what its header claims.

        Args:
            dtype: `float32` in [-1, 1], or `int16` or `int32` over their whole range.
            start: samples to leave out.
            num_frames: samples to read at most; None reads to the end.
        """


class SoundFileAudio:
    """An audio file that libsndfile decodes; see `AudioSource`."""

    def __init__(self, file: soundfile.SoundFile, cut_off: str | None = None) -> None:
        self.sampling_rate: int = file.samplerate
        self.num_channels: int = file.channels
        self.num_frames: int = file.frames
        self.subtype: str = file.subtype
        self.cut_off = cut_off
        self._file = file

    def blocks(self, dtype: str, start: int = 0, num_frames: int | None = None) -> Iterator[NDArray[Any]]:
        """See `AudioSource.blocks`."""
        at_a_time = max(1, _BLOCK_SAMPLES // self.num_channels)
        if start and self._file.seekable():
            self._file.seek(start)
        elif start:
            # Some codecs, such as GSM 6.10, are read from their start only.
            for _ in self._read(start, at_a_time, "int16"):
                pass
        left = self.num_frames - start if num_frames is None else min(num_frames, self.num_frames - start)
        num_read = 0
        for block in self._read(left, at_a_time, dtype):
            num_read += len(block)
            yield block
        if left - num_read > _LOSS_TOLERANCE_SECONDS * self.sampling_rate and self.cut_off is None:
            seconds, claimed = (start + num_read) / self.sampling_rate, (start + left) / self.sampling_rate
            self.cut_off = _ends_early(seconds, claimed)

    def _read(self, num_frames: int, at_a_time: int, dtype: str) -> Iterator[NDArray[Any]]:
        while num_frames > 0:
            asked = min(num_frames, at_a_time)
            block: NDArray[Any] = self._file.read(asked, dtype=dtype)
            yield block
            num_frames = num_frames - asked if len(block) == asked else 0


@contextmanager
def opened_audio(source: BinaryIO) -> Iterator[AudioSource]:
    """Open audio whose header claims neither an absurd length nor an absurd rate.

    Raises:
        AudioError: it does not, or cannot be decoded inside the block.
    """
    try:
        with _opened(source) as audio:
            _refuse_absurd_claims(audio)
            yield audio
    except AudioError:
        raise
    except UnusableError as error:
        raise AudioError(str(error), error.cause) from error
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        raise AudioError(f"does not decode ({_reason(error)})") from error


class _QuietSeeks:
    """A file that stays where it is when libsndfile, reading a damaged one, seeks before its start.

    Errors of Python inside a callback of C are printed with their traceback, and nobody can catch them.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Seek, if there is such a place; the position."""
        try:
            return self._file.seek(offset, whence)
        except (ValueError, OSError):
            return self._file.tell()


@contextmanager
def _opened(source: BinaryIO) -> Iterator[AudioSource]:
    head = source.read(_HEAD_BYTES)
    source, cut_off = _with_sizes(source, head)
    try:
        file = soundfile.SoundFile(_QuietSeeks(source))
    except soundfile.SoundFileError as error:
        with _opened_otherwise(source, head, error) as audio:
            yield audio
        return
    with file:
        if file.format == "MP3":
            with _opened_mp3(source, file) as audio:
                yield audio
        else:
            yield SoundFileAudio(file, cut_off or (_cut_inside_page(source) if file.format == "OGG" else None))


@contextmanager
def _opened_mp3(source: BinaryIO, file: soundfile.SoundFile) -> Iterator[AudioSource]:
    """Open an MP3 so that all of its frames are read.

    Raises:
        UnusableError: its rate or number of channels changes inside, and PyAV is not installed.
    """
    try:
        frames = _repaired_mp3(source)
    except UnusableError as error:
        if not can_decode_media():
            raise UnusableError(error.cause, f"{error}: {REMEDY}") from error
        with opened_media(source) as media:
            yield media
        return
    if frames is None:
        yield SoundFileAudio(file)
        return
    with _opened_frames(frames) as audio:
        yield audio


@contextmanager
def _opened_otherwise(source: BinaryIO, head: bytes, error: Exception) -> Iterator[AudioSource]:
    """Open what libsndfile refuses: MP3 that begins with something else, and media.

    Raises:
        UnusableError: it is neither, or PyAV is not installed.
    """
    if (reason := placeholder_reason(head) or stray_reason(head)) is not None:
        raise UnusableError(Cause.UNDECODABLE, reason)
    if (frames := _frames_of(source)) is not None:
        with _opened_frames(frames) as audio:
            yield audio
        return
    name = media_name(head)
    if not can_decode_media():
        if name is None:
            raise error
        raise UnusableError(Cause.UNDECODABLE, f"is {name}, which libsndfile does not decode: {REMEDY}")
    try:
        with opened_media(source) as media:
            yield media
    except UnusableError as failure:
        if name is None:
            raise
        raise UnusableError(failure.cause, f"is {name}, but {failure}") from failure


@contextmanager
def _opened_frames(frames: Mp3Frames) -> Iterator[AudioSource]:
    cut_off = None
    rate = frames.kind.sampling_rate
    if frames.claimed_samples is not None and frames.num_samples < frames.claimed_samples:
        cut_off = _ends_early(frames.num_samples / rate, frames.claimed_samples / rate)
    with soundfile.SoundFile(io.BytesIO(frames.with_length())) as file:
        audio = SoundFileAudio(file, cut_off)
        if abs(audio.num_frames - frames.num_samples) > _LOSS_TOLERANCE_SECONDS * rate:
            seconds, there = audio.num_frames / rate, frames.num_samples / rate
            raise UnusableError(Cause.UNDECODABLE, f"is an MP3 of which only {seconds:.2f} of {there:.2f} s decode")
        yield audio


def _refuse_absurd_claims(audio: AudioSource) -> None:
    # A damaged header may claim anything, and some formats store silence in almost no bytes.
    if audio.num_frames is not None and audio.num_frames > LONGEST_CLIP_SECONDS * audio.sampling_rate:
        claimed, longest = audio.num_frames / audio.sampling_rate / 3600, LONGEST_CLIP_SECONDS / 3600
        message = f"claims to be {claimed:.0f} h long, more than the limit of {longest:.0f} h"
        raise AudioError(message, Cause.ABSURD_CLAIM)
    if audio.sampling_rate not in _RATES:
        raise AudioError(f"claims a sampling rate of {audio.sampling_rate} Hz", Cause.ABSURD_CLAIM)


def _with_sizes(source: BinaryIO, head: bytes) -> tuple[BinaryIO, str | None]:
    """The file at its start, with a WAV header that libsndfile reads; and how much of it is missing, if any."""
    sizes = read_wav_sizes(source) if head[8:12] == b"WAVE" else None
    if sizes is None:
        source.seek(0)
        return source, None
    if not sizes.is_readable:
        source.seek(len(sizes.head))
        return io.BytesIO(sizes.new_head() + source.read()), None
    source.seek(0)
    if not sizes.is_cut_off or sizes.claimed_bytes is None or sizes.claimed_seconds is None:
        return source, None
    seconds = sizes.claimed_seconds * sizes.num_bytes / sizes.claimed_bytes
    return source, _ends_early(seconds, sizes.claimed_seconds)


def _repaired_mp3(source: BinaryIO) -> Mp3Frames | None:
    """The frames of an MP3 that libsndfile would not read whole; None if it does."""
    try:
        status = os.fstat(source.fileno())
    except OSError:
        return _not_plain(_frames_of(source, is_known=True))
    # Parts of a recording are read one after the other.
    return _repaired_file(_Opened(source, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)))


class _Opened:
    """An open file that equals another one of the same identity."""

    def __init__(self, source: BinaryIO, identity: tuple[int, ...]) -> None:
        self.source: BinaryIO | None = source
        self._identity = identity

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Opened) and other._identity == self._identity

    def __hash__(self) -> int:
        return hash(self._identity)


@lru_cache(maxsize=1)
def _repaired_file(opened: _Opened) -> Mp3Frames | None:
    source, opened.source = opened.source, None
    return None if source is None else _not_plain(_frames_of(source, is_known=True))


def _not_plain(frames: Mp3Frames | None) -> Mp3Frames | None:
    return None if frames is None or frames.is_plain else frames


def _frames_of(source: BinaryIO, is_known: bool = False) -> Mp3Frames | None:
    position = source.tell()
    source.seek(0)
    try:
        return find_mp3_frames(source.read(), is_known)
    finally:
        source.seek(position)


def _cut_inside_page(source: BinaryIO) -> str | None:
    """Whether an Ogg file ends inside its last page, as a predicate; live streams end at any page.

    Source: RFC 3533, section 6.
    """
    position = source.tell()
    total = source.seek(0, 2)
    source.seek(max(0, total - _OGG_TAIL_BYTES))
    tail = source.read()
    source.seek(position)
    page = tail[max(0, tail.rfind(b"OggS")) :]
    num_segments = page[26] if len(page) > 26 else 255
    is_whole = len(page) >= 27 + num_segments + sum(page[27 : 27 + num_segments])
    return None if is_whole else "ends inside a page: its end is missing"


def _ends_early(seconds: float, claimed: float) -> str:
    return f"ends after {seconds:.2f} s of the {claimed:.2f} s that its header claims"


def _reason(error: Exception) -> str:
    # libsndfile names the object in memory before the reason, and has no text for some errors.
    reason = str(error).rpartition(": ")[2].removesuffix(".")
    return reason or f"{type(error).__name__} {getattr(error, 'code', '')}".strip()

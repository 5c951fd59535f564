"""Audio that libsndfile does not decode (AAC, WMA, AMR, video), decoded by FFmpeg through PyAV (extra `media`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.data.stored.checks import Cause, UnusableError

REMEDY = "install `voxtral-dist[media]`, or convert it by `ffmpeg -i FILE FILE.flac`"
# Containers and codecs of audio. No playlist: those name other files and addresses, which FFmpeg would open.
_FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dts,eac3,flac,flv,gsm,loas,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,"
    "mp3,mpeg,mpegts,ogg,rm,tak,tta,voc,w64,wav,wv"
)
# Packets that are skipped at most, of a thousand: players skip damaged ones.
_MAX_DAMAGED = 10


def can_decode_media() -> bool:
    """Whether PyAV is installed."""
    return find_spec("av") is not None


class MediaAudio:
    """The first audio stream of a media file, as `AudioSource`.

    The number of samples is known only when all are decoded.
    """

    # Lossy in all but a few files: 16 bits hold what there is.
    subtype = "MEDIA"
    num_frames = None

    def __init__(self, container: Any, stream: Any) -> None:
        self.sampling_rate: int = stream.rate
        self.num_channels: int = stream.codec_context.layout.nb_channels
        self._container = container
        self._stream = stream
        self.cut_off: str | None = None

    def blocks(self, dtype: str, start: int = 0, num_frames: int | None = None) -> Iterator[NDArray[Any]]:
        """See `AudioSource.blocks`."""
        position, end = 0, None if num_frames is None else start + num_frames
        for block in self._decoded():
            first = max(0, start - position)
            last = len(block) if end is None else min(len(block), end - position)
            position += len(block)
            if first < last:
                yield _converted(block[first:last], dtype)
            if end is not None and position >= end:
                return
        self._note_cut(position)

    def _decoded(self) -> Iterator[NDArray[np.float32]]:
        """All blocks, float32 `(num_frames, num_channels)`."""
        import av

        layout, resampler, kind = self._stream.codec_context.layout, None, None
        for frame in self._frames():
            # Rate and channels may change inside, where files were joined.
            if (frame.format.name, frame.layout.name, frame.rate) != kind:
                yield from self._resampled(resampler, None)
                kind = (frame.format.name, frame.layout.name, frame.rate)
                resampler = av.AudioResampler("flt", layout, self.sampling_rate)
            yield from self._resampled(resampler, frame)
        yield from self._resampled(resampler, None)

    def _resampled(self, resampler: Any, frame: Any) -> Iterator[NDArray[np.float32]]:
        """The blocks of a frame; those that remain in the resampler for None."""
        for part in resampler.resample(frame) if resampler is not None else ():
            yield part.to_ndarray().reshape(-1, self.num_channels)

    def _frames(self) -> Iterator[Any]:
        import av

        num_damaged = 0
        for num_packets, packet in enumerate(self._container.demux(self._stream)):
            try:
                yield from packet.decode()
            except av.error.InvalidDataError as error:
                num_damaged += 1
                if num_damaged > _MAX_DAMAGED + num_packets * _MAX_DAMAGED // 1000:
                    raise UnusableError(
                        Cause.UNDECODABLE, "does not decode: many of its packets are damaged"
                    ) from error

    def _note_cut(self, num_frames: int) -> None:
        """Compare what was decoded with the length that the file states; only some containers state it."""
        if self._stream.duration is None or "mp4" not in self._container.format.name:
            return
        stated = float(self._stream.duration * self._stream.time_base)
        seconds = num_frames / self.sampling_rate
        if seconds < 0.95 * stated - 0.5:
            self.cut_off = f"ends after {seconds:.2f} s of the {stated:.2f} s that it states"


@contextmanager
def opened_media(source: BinaryIO) -> Iterator[MediaAudio]:
    """Open a media file by PyAV, which must be installed.

    Raises:
        UnusableError: FFmpeg does not know its format, it has no audio, or does not decode inside the block.
    """
    import av

    # FFmpeg writes what it thinks of a file to standard error.
    av.logging.set_level(av.logging.PANIC)
    source.seek(0)
    try:
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
        with av.open(source, options=options) as container:
            if not container.streams.audio:
                raise UnusableError(Cause.EMPTY_AUDIO, "is a media file without audio")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise UnusableError(Cause.UNDECODABLE, "is a media file whose codec FFmpeg does not know")
            # Workers are processes; threads of their own would compete for the same cores.
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            if not stream.rate or not stream.codec_context.layout.nb_channels:
                raise UnusableError(Cause.UNDECODABLE, "is a media file whose audio states no sampling rate")
            yield MediaAudio(container, stream)
    except av.error.FFmpegError as error:
        raise UnusableError(Cause.UNDECODABLE, f"does not decode (FFmpeg: {error.strerror})") from error


def _converted(block: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Samples as float32, int16 or int32 (24 bits, shifted), `(num_frames,)` if there is one channel."""
    samples = block[:, 0] if block.shape[1] == 1 else block
    if dtype == "float32":
        return samples
    scale = 2**15 if dtype == "int16" else 2**31
    return np.clip(np.rint(samples.astype(np.float64) * scale), -scale, scale - 1).astype(dtype)

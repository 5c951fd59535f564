"""Files that FFmpeg decodes and libsndfile does not, written by PyAV (the extra `media`)."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np

from corpora import tone


def encoded(
    container: str, codec: str, rate: int, num_channels: int = 1, seconds: float = 1.0, path: Path | None = None
) -> bytes:
    """The file of a tone; written to a path, its table of contents lies in front."""
    import av

    contents, layout = io.BytesIO(), "stereo" if num_channels == 2 else "mono"
    samples = np.stack([tone(seconds, rate) / np.float32(32768)] * num_channels)
    options = {"movflags": "faststart"} if path else {}
    with av.open(str(path or "") or contents, "w", format=container, options=options) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        for start in range(0, samples.shape[1], 1024):
            part = np.ascontiguousarray(samples[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
            frame.rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path.read_bytes() if path else contents.getvalue()

"""Corpora of short tones, written file by file as other tools do; the tone of an utterance tells which one it is."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from voxtral_dist.data.stored.audio import decode_audio
from voxtral_dist.data.stored.checks import Cause
from voxtral_dist.shards.corpus.corpus import open_corpus
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.utterances import Refusal, Utterance

RATE = 16_000


def clip(number: int, seconds: float = 0.5) -> NDArray[np.int16]:
    """A tone whose frequency tells its number."""
    time = np.arange(round(seconds * RATE)) / RATE
    return np.rint(8000 * np.sin(2 * np.pi * hertz(number) * time)).astype(np.int16)


def hertz(number: int) -> int:
    return 300 + 100 * number


def encoded(samples: NDArray[Any], file_format: str = "WAV") -> bytes:
    contents = io.BytesIO()
    soundfile.write(contents, samples, RATE, format=file_format)
    return contents.getvalue()


def write(path: Path, contents: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return path


def write_clip(path: Path, number: int, seconds: float = 0.5) -> Path:
    return write(path, encoded(clip(number, seconds), "FLAC" if path.suffix == ".flac" else "WAV"))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, contents in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return path


def lines_of(source: Path | str, **options: Any) -> list[Utterance | Refusal]:
    return list(open_corpus(str(source), CorpusOptions(**options)).lines())


def heard(utterance: Utterance) -> tuple[str, int, float]:
    """The text of an utterance, the number of the clip that it is, and its seconds."""
    waveform = decode_audio(utterance.audio.found().read(), RATE)
    spectrum = np.abs(np.fft.rfft(waveform[: RATE // 10]))
    return utterance.text, round((int(spectrum.argmax()) * 10 - 300) / 100), round(len(waveform) / RATE, 2)


def all_heard(source: Path | str, **options: Any) -> list[tuple[str, int, float]]:
    lines = lines_of(source, **options)
    refused = [line.reason for line in lines if isinstance(line, Refusal)]
    assert not refused
    return [heard(line) for line in lines if isinstance(line, Utterance)]


def refusals(source: Path | str, **options: Any) -> list[tuple[Cause, str]]:
    return [(line.cause, line.message) for line in lines_of(source, **options) if isinstance(line, Refusal)]

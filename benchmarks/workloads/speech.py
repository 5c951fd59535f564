"""Speech that the benchmarks read: made on the fly at 16 kHz, or packed into FLAC shards, and a model folder for it.

It is real speech from the AN4 corpus in `../shared/data` where that is present, and else noise with the rhythm of
syllables, which compresses and decodes at about the same speed. Every result says which of the two it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from voxtral_dist.model.tiny import TinyShape, build_tiny_voxtral
from voxtral_dist.shards.corpus.corpus import open_corpus
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.packing import PackOptions, pack

from workloads.lengths import SHORTEST_SECONDS, WORDS_PER_SECOND, librispeech_durations

AN4 = Path(__file__).resolve().parent.parent.parent.parent / "shared" / "data" / "an4"
SAMPLING_RATE = 16_000
NUM_SHARDS = 16
# The published window and vocabulary order, and the smallest widths: only tokenizer and processor are used.
PROCESSOR_SHAPE = TinyShape(
    window_seconds=30.0,
    vocab_size=8192,
    encoder_width=16,
    encoder_layers=1,
    encoder_heads=1,
    text_width=16,
    text_layers=1,
    text_heads=1,
    text_kv_heads=1,
    text_ffn_width=16,
)
_WORDS = ("the", "of", "and", "to", "in", "that", "was", "with", "had", "for", "it", "not", "from", "she", "they")

Pcm = NDArray[np.int16]


@dataclass(frozen=True)
class Corpus:
    """Shards and their contents."""

    shards: Path
    num_examples: int
    audio_seconds: float
    source: str

    @property
    def mean_seconds(self) -> float:
        """Mean duration of an utterance."""
        return self.audio_seconds / self.num_examples


@dataclass(frozen=True)
class Utterance:
    """16-bit samples at 16 kHz and their transcript."""

    pcm: Pcm
    text: str

    @property
    def seconds(self) -> float:
        """Duration of the audio."""
        return len(self.pcm) / SAMPLING_RATE


@dataclass(frozen=True)
class ClipFile:
    """A file of audio and its transcript."""

    audio: str
    text: str


@dataclass(frozen=True)
class ClipFiles:
    """Shards, and the files that they were packed from, in the same order."""

    corpus: Corpus
    clips: tuple[ClipFile, ...]


def source() -> str:
    """Name of the speech: `AN4`, or `synthetic`."""
    return "AN4" if AN4.is_dir() else "synthetic"


def write_model(folder: Path, vocab_size: int = PROCESSOR_SHAPE.vocab_size) -> Path:
    """A folder with Voxtral's tokenizer and processor files and a window of 30 s."""
    build_tiny_voxtral(folder, replace(PROCESSOR_SHAPE, vocab_size=vocab_size))
    return folder


def short_clips(num_utterances: int) -> list[Utterance]:
    """AN4's utterances unchanged: 2.7 s on average."""
    return list(islice(_speech(), num_utterances))


def librispeech_like(num_utterances: int) -> list[Utterance]:
    """Utterances with the durations of LibriSpeech, made of shorter ones that are joined and cut."""
    return clips_of_seconds(librispeech_durations(num_utterances, seed=0))


def clips_of_seconds(durations: Sequence[float]) -> list[Utterance]:
    """Utterances of these lengths, made of shorter ones that are joined and cut."""
    speech = _speech()
    return [_joined(speech, round(seconds * SAMPLING_RATE)) for seconds in durations]


def long_clips(num_utterances: int, seconds: float) -> list[Utterance]:
    """Utterances of equal length, made of shorter ones that are joined and cut."""
    return clips_of_seconds([seconds] * num_utterances)


def write_short_clips(folder: Path, num_utterances: int) -> Corpus:
    """The packed `short_clips`."""
    return _pack(folder, short_clips(num_utterances))


def write_librispeech_like(folder: Path, num_utterances: int) -> Corpus:
    """The packed `librispeech_like`."""
    return _pack(folder, librispeech_like(num_utterances))


def write_clips(folder: Path, utterances: Sequence[Utterance]) -> ClipFiles:
    """The utterances as files, and packed."""
    corpus = _pack(folder, utterances)
    paths = sorted((folder / "audio").iterdir())
    clips = [ClipFile(str(path), one.text) for path, one in zip(paths, utterances, strict=True)]
    return ClipFiles(corpus, tuple(clips))


def _pack(folder: Path, utterances: Sequence[Utterance]) -> Corpus:
    audio = folder / "audio"
    audio.mkdir(parents=True)
    rows = []
    for number, utterance in enumerate(utterances):
        name = f"{number:06d}.flac"
        soundfile.write(audio / name, utterance.pcm, SAMPLING_RATE)
        rows.append({"audio_filepath": f"audio/{name}", "text": utterance.text, "lang": "en"})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    num_bytes = sum(file.stat().st_size for file in audio.iterdir())
    pack(open_corpus(str(manifest), CorpusOptions()), folder / "shards", PackOptions(max(1, num_bytes // NUM_SHARDS)))
    seconds = sum(utterance.seconds for utterance in utterances)
    return Corpus(folder / "shards", len(utterances), seconds, source())


def _speech() -> Iterator[Utterance]:
    """Endless short utterances; AN4's in a fixed order that mixes speakers."""
    return _real_speech() if AN4.is_dir() else _synthetic_speech()


def _real_speech() -> Iterator[Utterance]:
    rows = [json.loads(line) for line in (AN4 / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    order = np.random.default_rng(0)
    while True:
        for place in order.permutation(len(rows)):
            pcm, _ = soundfile.read(AN4 / rows[place]["audio_filepath"], dtype="int16")
            yield Utterance(pcm, rows[place]["text"].lower())


def _synthetic_speech() -> Iterator[Utterance]:
    rng = np.random.default_rng(0)
    while True:
        seconds = rng.uniform(SHORTEST_SECONDS, 4.0)
        time = np.arange(round(seconds * SAMPLING_RATE)) / SAMPLING_RATE
        # A running mean takes away high frequencies, as in speech; about four syllables a second.
        noise = np.convolve(rng.normal(0, 0.3, len(time)), np.full(8, 1 / 8), mode="same")
        syllables = np.sin(2 * np.pi * 2 * time + rng.uniform(0, np.pi)) ** 2
        words = rng.choice(_WORDS, max(1, round(seconds * WORDS_PER_SECOND)))
        yield Utterance(np.rint(noise * syllables * 32767).clip(-32768, 32767).astype(np.int16), " ".join(words))


def _joined(speech: Iterator[Utterance], num_samples: int) -> Utterance:
    parts: list[Utterance] = []
    while sum(len(part.pcm) for part in parts) < num_samples:
        parts.append(next(speech))
    return Utterance(np.concatenate([part.pcm for part in parts])[:num_samples], " ".join(part.text for part in parts))

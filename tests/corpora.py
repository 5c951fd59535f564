"""Small shapes of Voxtral, and corpora of tones in noise with transcripts in several languages."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from voxtral_dist.data.stored.audio import decode_audio, to_pcm
from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.data.stored.shard_set import RECORD, UNKNOWN_LANGUAGE, Shard, ShardSet
from voxtral_dist.model.tiny import TinyShape
from voxtral_dist.shards.corpus.corpus import open_corpus
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.packing import PackOptions, pack
from voxtral_dist.shards.summary import SetSummary

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_SPEECH = REPOSITORY.parent / "shared" / "data"

# All sizes are explicit, so that tests don't change with the defaults of `TinyShape`. Two heads share keys and values.
TINY_SHAPE = TinyShape(
    window_seconds=1.28,
    vocab_size=512,
    encoder_width=64,
    encoder_layers=2,
    encoder_heads=2,
    text_width=64,
    text_layers=2,
    text_heads=2,
    text_kv_heads=1,
    text_ffn_width=128,
)
REAL_WINDOW_SHAPE = TinyShape(
    window_seconds=30.0,
    vocab_size=512,
    encoder_width=16,
    encoder_layers=1,
    encoder_heads=1,
    text_width=16,
    text_layers=1,
    text_heads=1,
    text_kv_heads=1,
    text_ffn_width=16,
)
NUM_UTTERANCES = 26
# Small enough for the set to have several shards.
SHARD_BYTES = 400_000

# Texts with ASCII, umlauts and accents, and one without a language.
_TRANSCRIPTS = (
    ("en", "seven green bottles"),
    ("de", "Übermorgen fährt der Zug früher"),
    ("fr", "l'été dernier, à Genève"),
    (None, "one two"),
)
_FORMATS = (("flac", 16_000), ("wav", 8_000), ("wav", 16_000))


def tone(duration_seconds: float, sampling_rate: int = 16_000, seed: int = 0) -> NDArray[np.int16]:
    """A mono int16 waveform of a few sines under noise, different for each seed."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(duration_seconds * sampling_rate)) / sampling_rate
    frequencies, loudness = rng.uniform(100, 3500, 3), rng.uniform(0.02, 0.25, 3)
    sines = (loudness[:, None] * np.sin(2 * np.pi * frequencies[:, None] * time)).sum(axis=0)
    noise = rng.normal(0, 0.01, len(time))
    return np.rint((sines + noise) * 32767).clip(-32768, 32767).astype(np.int16)


def real_speech(duration_seconds: float) -> NDArray[np.int16] | None:
    """Clips of AN4 joined and cut to this length, at 16 kHz; None if the corpus is absent."""
    clips = sorted((REAL_SPEECH / "an4" / "audio").glob("*.flac"))
    if not clips:
        return None
    num_samples = round(duration_seconds * 16_000)
    joined = np.zeros(0, dtype=np.int16)
    for clip in clips:
        joined = np.concatenate([joined, to_pcm(decode_audio(clip.read_bytes(), 16_000))])
        if len(joined) >= num_samples:
            return joined[:num_samples]
    return None


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows to a file of JSON lines; return its path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_speech_manifest(
    folder: Path, num_utterances: int, *, min_seconds: float = 0.3, max_seconds: float = 3.9, seed: int = 0
) -> Path:
    """Write audio files and `manifest.jsonl` into a folder; return the path of the manifest.

    Durations, formats, sampling rates and languages vary; each line has an extra field `speaker`.
    """
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    durations = np.random.default_rng(seed).uniform(min_seconds, max_seconds, num_utterances)
    rows = []
    for number, duration_seconds in enumerate(durations):
        suffix, sampling_rate = _FORMATS[number % len(_FORMATS)]
        name = f"audio/{seed}_{number:03d}.{suffix}"
        soundfile.write(folder / name, tone(duration_seconds, sampling_rate, seed + number), sampling_rate)
        language, text = _TRANSCRIPTS[number % len(_TRANSCRIPTS)]
        fields = {"text": f"{text} {number}", "lang": language, "speaker": f"speaker-{number % 5}"}
        rows.append({"audio_filepath": name} | fields)
    return write_lines(folder / "manifest.jsonl", rows)


def synthetic_set(num_utterances: int, *, seed: int = 0, max_seconds: float = 29.0) -> ShardSet:
    """An index of utterances without tars: shards of uneven sizes, two languages and an unknown one."""
    rng = np.random.default_rng((seed, num_utterances))
    records = np.zeros(num_utterances, dtype=RECORD)
    records["duration_ms"] = rng.uniform(300, 1000 * max_seconds, num_utterances)
    records["num_chars"] = records["duration_ms"] / 1000 * rng.uniform(5, 20, num_utterances)
    records["num_text_tokens"] = records["num_chars"] // 4
    records["language"] = rng.choice([0, 1, 1, UNKNOWN_LANGUAGE], num_utterances)
    counts = [num_utterances // 3, 0, num_utterances - num_utterances // 3]
    return ShardSet(
        shards=tuple(Shard(f"nowhere/{number}.tar", count, 0, "") for number, count in enumerate(counts)),
        records=records,
        first_rows=np.cumsum([0, *counts[:-1]], dtype=np.int64),
        languages=("de", "en"),
        layout=UtteranceLayout(),
        longest_seconds=float(records["duration_ms"].max(initial=0)) / 1000,
        most_text_tokens=int(records["num_text_tokens"].max(initial=0)),
        most_instruction_tokens=0,
        records_sha256=hashlib.sha256(records.tobytes()).hexdigest(),
    )


def pack_manifest(manifest: Path, out_dir: Path, shard_bytes: int, skip_bad: bool) -> SetSummary:
    """Pack a JSONL manifest in this process; see `pack`."""
    source = open_corpus(str(manifest), CorpusOptions(corpus_format="jsonl"))
    return pack(source, out_dir, PackOptions(shard_bytes, skip_bad))

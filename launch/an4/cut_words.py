"""Training speech made of AN4: its 819 utterances, and new sentences made of their words.

    python launch/an4/cut_words.py MANIFEST OUT_DIR --seed 0

writes `OUT_DIR/{words,sentences}.jsonl` and `OUT_DIR/{words,sentences}/*.flac` (16 kHz, mono). A model that starts from
nothing learns 819 sentences by heart before it learns to listen. So utterances are cut into their words (alignment.py):
one to three of them at a time to begin with, then sentences which nobody knows, of words of one speaker, and the 819 as
they are. All is also played faster and slower, as Ko et al. (Interspeech 2015, "Audio Augmentation for Speech
Recognition") do.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import soundfile
import soxr

from alignment import FRAME, SAMPLING_RATE, Utterance, Waveform, Word, align, syllables

SPEEDS = (0.85, 1.15)
# Longest part of a pause that is kept at either end of a piece.
KEPT_FRAMES = 6
# Loudness rises and falls for 5 ms at either end, so that a cut does not click.
FADE_SAMPLES = SAMPLING_RATE // 200
# Longest piece that is an utterance of its own: it fits into a window of 1.6 s at the slowest speed.
MAX_PIECE_SECONDS = 1.3
MAX_WORDS_OF_PIECE = 3
# Longest sentence before its last piece.
MAX_MADE_SECONDS = 4.0


@dataclass(frozen=True)
class Aligned:
    """An utterance and the spans of its words."""

    utterance: Utterance
    words: Sequence[Word]

    def piece(self, first: int, num_words: int) -> Utterance:
        """Consecutive words with a part of the pauses around them, faded at both ends."""
        whole = self.utterance.waveform
        stops = [0, *(word.stop for word in self.words)]
        starts = [*(word.start for word in self.words), len(whole) // FRAME]
        start = max(stops[first], starts[first] - KEPT_FRAMES)
        stop = min(starts[first + num_words], stops[first + num_words] + KEPT_FRAMES)
        waveform = whole[start * FRAME : stop * FRAME].copy()
        fade = np.linspace(0, 1, FADE_SAMPLES, dtype=np.float32)
        waveform[:FADE_SAMPLES] *= fade
        waveform[-FADE_SAMPLES:] *= fade[::-1]
        words = tuple(word.text for word in self.words[first : first + num_words])
        return Utterance(self.utterance.speaker, words, waveform)

    def pieces(self) -> Iterator[Utterance]:
        """All pieces that are short enough to be utterances of their own."""
        for num_words in range(1, MAX_WORDS_OF_PIECE + 1):
            for first in range(len(self.words) - num_words + 1):
                piece = self.piece(first, num_words)
                if piece.seconds <= MAX_PIECE_SECONDS:
                    yield piece


def main() -> None:
    """Write the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-pieces", type=int, default=16_000, help="of one to three words, each at its own speed")
    parser.add_argument("--num-made", type=int, default=16_000, help="sentences made of pieces")
    parser.add_argument("--num-copies", type=int, default=5, help="of each utterance, the first one as it is")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    utterances = read_manifest(arguments.manifest)
    aligned = [Aligned(utterance, words) for utterance, words in zip(utterances, align(utterances), strict=True)]
    print(lengths(aligned))
    write_speech(arguments.out_dir, "words", short_pieces(aligned, draw, arguments.num_pieces))
    made = made_sentences(aligned, draw, arguments.num_made)
    write_speech(arguments.out_dir, "sentences", chain(made, copies(utterances, draw, arguments.num_copies)))


def lengths(aligned: Sequence[Aligned]) -> str:
    """Lengths of the syllables, which show whether the words were found correctly."""
    frames = [(word.stop - word.start) / syllables(word.text) for one in aligned for word in one.words]
    low, middle, high = np.percentile(frames, (5, 50, 95)) * FRAME / SAMPLING_RATE
    return f"{len(frames)} words: a syllable lasts {middle:.2f} s, 9 of 10 from {low:.2f} to {high:.2f} s"


def write_speech(out_dir: Path, name: str, spoken: Iterator[Utterance]) -> None:
    """Write audio files and a manifest."""
    (out_dir / name).mkdir(parents=True, exist_ok=True)
    with (out_dir / f"{name}.jsonl").open("w", encoding="utf-8") as manifest:
        for number, utterance in enumerate(spoken):
            path = f"{name}/{number:05d}.flac"
            soundfile.write(out_dir / path, utterance.waveform, SAMPLING_RATE, subtype="PCM_16")
            row = {
                "audio_filepath": path,
                "text": " ".join(utterance.words),
                "lang": "en",
                "speaker": utterance.speaker,
                "duration": round(len(utterance.waveform) / SAMPLING_RATE, 4),
            }
            manifest.write(json.dumps(row) + "\n")


def read_manifest(path: Path) -> list[Utterance]:
    """Read the utterances that a manifest lists."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Utterance(
            speaker=row["speaker"],
            words=tuple(row["text"].split()),
            waveform=soundfile.read(path.parent / row["audio_filepath"], dtype="float32")[0],
        )
        for row in rows
    ]


def short_pieces(aligned: Sequence[Aligned], draw: random.Random, num_pieces: int) -> Iterator[Utterance]:
    """Draw short pieces, each about equally often."""
    pieces = [piece for one in aligned for piece in one.pieces()]
    draw.shuffle(pieces)
    for number in range(num_pieces):
        yield at_other_speed(pieces[number % len(pieces)], draw)


def made_sentences(aligned: Sequence[Aligned], draw: random.Random, num_made: int) -> Iterator[Utterance]:
    """Make sentences of a speaker's pieces in random order; all utterances are equally likely."""
    by_speaker: dict[str, list[Aligned]] = defaultdict(list)
    for one in aligned:
        by_speaker[one.utterance.speaker].append(one)
    for _ in range(num_made):
        speaker = draw.choice(aligned).utterance.speaker
        words: list[str] = []
        parts: list[Waveform] = []
        left = MAX_MADE_SECONDS * draw.random()
        while left > 0:
            one = draw.choice(by_speaker[speaker])
            num_words = draw.randint(1, min(MAX_WORDS_OF_PIECE, len(one.words)))
            piece = one.piece(draw.randint(0, len(one.words) - num_words), num_words)
            words.extend(piece.words)
            parts.append(piece.waveform)
            left -= piece.seconds
        yield at_other_speed(Utterance(speaker, tuple(words), np.concatenate(parts)), draw)


def copies(utterances: Sequence[Utterance], draw: random.Random, num_copies: int) -> Iterator[Utterance]:
    """Yield every utterance unchanged, and again at other speeds."""
    for utterance in utterances:
        yield utterance
        for _ in range(num_copies - 1):
            yield at_other_speed(utterance, draw)


def at_other_speed(utterance: Utterance, draw: random.Random) -> Utterance:
    """Resample a waveform, which changes speed and pitch together."""
    resampled: Waveform = soxr.resample(utterance.waveform, SAMPLING_RATE * draw.uniform(*SPEEDS), SAMPLING_RATE)
    return Utterance(utterance.speaker, utterance.words, resampled)


if __name__ == "__main__":
    main()

"""Speech to learn AN4's words from: its 819 utterances, and sentences newly made of the words in them.

    python launch/an4/cut_words.py MANIFEST OUT_DIR --seed 0

writes `OUT_DIR/{words,sentences}.jsonl` and `OUT_DIR/{words,sentences}/*.flac` (16 kHz, mono). A model that starts from
nothing learns 819 sentences by heart before it learns to listen. People who spell or count pause between words, so
utterances can be cut in their pauses: into words to begin with, and into pieces that make sentences which nobody knows,
joined within a speaker. All is also played faster and slower, as Ko et al. (Interspeech 2015, "Audio Augmentation for
Speech Recognition") do.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

SAMPLING_RATE = 16_000
FRAME = SAMPLING_RATE // 100
SMOOTHED_FRAMES = 5
# Loudness from 0, the quietest twentieth of an utterance, to 1, its loudest.
PERCENTILES = (5, 95)
PAUSE_LOUDNESS = 0.25
PAUSE_FRAMES = 6
# How much a word of an unlikely length costs, in units of the loudness at a cut.
LENGTH_COST = 0.5
FRAMES_OF_SYLLABLE = (10, 70)
# What is kept of a pause at either end of a piece, at most.
KEPT_FRAMES = PAUSE_FRAMES
SPEEDS = (0.85, 1.15)
# Of a piece that is learned by itself, and of a sentence before its last piece.
MAX_SINGLE_SECONDS = 1.5
MAX_MADE_SECONDS = 4.0

LETTER_SYLLABLES = {"W": 3.0}
VOWELS = "AEIOUY"

Waveform = NDArray[np.float32]


@dataclass(frozen=True)
class Piece:
    """Words in a row without a sure pause between them, and nothing else of the utterance that they are from."""

    words: tuple[str, ...]
    waveform: Waveform

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.waveform) / SAMPLING_RATE


@dataclass(frozen=True)
class Sentence:
    """One utterance of the corpus."""

    speaker: str
    words: tuple[str, ...]
    waveform: Waveform


def main() -> None:
    """Write the corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-words", type=int, default=8_000, help="single pieces, each at its own speed")
    parser.add_argument("--num-made", type=int, default=12_000, help="sentences made of pieces")
    parser.add_argument("--num-copies", type=int, default=4, help="of each utterance, the first one as it is")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    utterances = read_manifest(arguments.manifest)
    pieces = pieces_of_speakers(utterances)
    num_pieces = sum(map(len, pieces.values()))
    num_single = sum(len(piece.words) == 1 for mine in pieces.values() for piece in mine)
    print(f"{len(utterances)} utterances gave {num_pieces} pieces, {num_single} of them a single word")
    write_speech(arguments.out_dir, "words", single_pieces(pieces, draw, arguments.num_words))
    made = made_sentences(pieces, draw, arguments.num_made)
    write_speech(arguments.out_dir, "sentences", chain(made, copies(utterances, draw, arguments.num_copies)))


def write_speech(out_dir: Path, name: str, spoken: Iterator[Sentence]) -> None:
    """Audio files, and a manifest."""
    (out_dir / name).mkdir(parents=True, exist_ok=True)
    with (out_dir / f"{name}.jsonl").open("w", encoding="utf-8") as manifest:
        for number, sentence in enumerate(spoken):
            path = f"{name}/{number:05d}.flac"
            soundfile.write(out_dir / path, sentence.waveform, SAMPLING_RATE, subtype="PCM_16")
            row = {
                "audio_filepath": path,
                "text": " ".join(sentence.words),
                "lang": "en",
                "speaker": sentence.speaker,
                "duration": round(len(sentence.waveform) / SAMPLING_RATE, 4),
            }
            manifest.write(json.dumps(row) + "\n")


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """Its rows, with their waveforms."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row | {"waveform": soundfile.read(path.parent / row["audio_filepath"], dtype="float32")[0]} for row in rows]


def pieces_of_speakers(utterances: Sequence[dict[str, Any]]) -> dict[str, list[Piece]]:
    """All pieces, by speaker."""
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for row in utterances:
        pieces[row["speaker"]].extend(cut_in_pauses(row["waveform"], row["text"].split()))
    return dict(pieces)


def cut_in_pauses(waveform: Waveform, words: Sequence[str]) -> Iterator[Piece]:
    """Find where each word ends, and cut where that is a pause."""
    loudness = loudness_of(waveform)
    speech = np.flatnonzero(loudness > PAUSE_LOUDNESS)
    ends = ends_of_words(loudness, int(speech[0]), int(speech[-1]) + 1, words)
    start, first = int(speech[0]), 0
    for number, end in enumerate(ends, start=1):
        pause = pause_around(loudness, end)
        if number == len(words):
            stop = following = end
        elif pause is not None:
            stop, following = pause
        else:
            continue
        if is_likely(stop - start, words[first:number]):
            kept = slice(max(0, start - KEPT_FRAMES) * FRAME, (stop + KEPT_FRAMES) * FRAME)
            yield Piece(tuple(words[first:number]), waveform[kept])
        start, first = following, number


def is_likely(num_frames: int, words: Sequence[str]) -> bool:
    """Whether words can last as long; otherwise something was cut in a wrong place."""
    shortest, longest = FRAMES_OF_SYLLABLE
    return shortest <= num_frames / sum(map(syllables, words)) <= longest


def loudness_of(waveform: Waveform) -> NDArray[np.float64]:
    """Of each frame of 10 ms, on the scale of `PERCENTILES`."""
    whole = waveform[: len(waveform) // FRAME * FRAME].astype(np.float64).reshape(-1, FRAME)
    power = np.convolve(np.square(whole).mean(axis=1), np.full(SMOOTHED_FRAMES, 1 / SMOOTHED_FRAMES), mode="same")
    decibels = 10 * np.log10(power + 1e-10)
    quiet, loud = np.percentile(decibels, PERCENTILES)
    scaled: NDArray[np.float64] = np.clip((decibels - quiet) / max(loud - quiet, 1.0), 0.0, 1.0)
    return scaled


def ends_of_words(loudness: NDArray[np.float64], start: int, stop: int, words: Sequence[str]) -> list[int]:
    """The frames that words end at, the last one at `stop`: quiet ones, and words of likely lengths between them.

    The best of all ways to choose, by dynamic programming.
    """
    places = np.array([start, *quiet_places(loudness, start, stop), stop])
    if len(places) <= len(words):
        return [start + (stop - start) * number // len(words) for number in range(1, len(words) + 1)]
    lengths = np.array([syllables(word) for word in words])
    lengths = lengths / lengths.sum() * (stop - start)
    at_place = np.append(loudness[places[:-1]], 0.0)
    # costs[place]: the least for the words so far to end there.
    costs = np.full(len(places), np.inf)
    costs[0] = 0.0
    before: list[NDArray[np.int64]] = []
    distances = places[None, :] - places[:, None]
    for length in lengths:
        with np.errstate(divide="ignore", invalid="ignore"):
            unlikely = np.square(np.log(np.where(distances > 0, distances, np.nan) / length))
        total = costs[:, None] + LENGTH_COST * np.where(distances > 0, unlikely, np.inf)
        before.append(total.argmin(axis=0))
        costs = total.min(axis=0) + at_place
    ends = [len(places) - 1]
    for chosen in before[:0:-1]:
        ends.append(int(chosen[ends[-1]]))
    return [int(places[end]) for end in reversed(ends)]


def quiet_places(loudness: NDArray[np.float64], start: int, stop: int) -> Iterator[int]:
    """The middle of every pause between two frames, and every other frame that is quieter than those around it."""
    frame = start + 1
    while frame < stop - 1:
        pause = pause_around(loudness, frame)
        if pause is not None:
            yield sum(pause) // 2
            frame = pause[1]
        elif loudness[frame - 1] >= loudness[frame] < loudness[frame + 1]:
            yield frame
        frame += 1


def syllables(word: str) -> float:
    """About how long a word lasts."""
    if len(word) == 1:
        return LETTER_SYLLABLES.get(word, 1.0)
    groups = sum(a in VOWELS and b not in VOWELS for a, b in zip(word, word[1:] + "#", strict=True))
    return float(max(1, groups - word.endswith("E")))


def pause_around(loudness: NDArray[np.float64], frame: int) -> tuple[int, int] | None:
    """The first frame of the pause around a frame and the one behind it; None where that is too short for a pause."""
    start = stop = frame
    while start > 0 and loudness[start - 1] < PAUSE_LOUDNESS:
        start -= 1
    while stop < len(loudness) and loudness[stop] < PAUSE_LOUDNESS:
        stop += 1
    return (start, stop) if stop - start >= PAUSE_FRAMES else None


def single_pieces(pieces: dict[str, list[Piece]], draw: random.Random, num_words: int) -> Iterator[Sentence]:
    """Short pieces by themselves, about equally often."""
    short = [
        (speaker, piece) for speaker, mine in pieces.items() for piece in mine if piece.seconds <= MAX_SINGLE_SECONDS
    ]
    for number in range(num_words):
        speaker, piece = short[number % len(short)]
        yield Sentence(speaker, piece.words, at_other_speed(piece.waveform, draw))


def made_sentences(pieces: dict[str, list[Piece]], draw: random.Random, num_made: int) -> Iterator[Sentence]:
    """Sentences of a speaker's pieces in any order; each piece is as likely as any other."""
    speakers = list(pieces)
    shares = [len(pieces[speaker]) for speaker in speakers]
    for _ in range(num_made):
        (speaker,) = draw.choices(speakers, weights=shares)
        words: list[str] = []
        parts: list[Waveform] = []
        left = MAX_MADE_SECONDS * draw.random()
        while left > 0:
            piece = draw.choice(pieces[speaker])
            words.extend(piece.words)
            parts.append(piece.waveform[: len(piece.waveform) - draw.randint(0, KEPT_FRAMES) * FRAME])
            left -= piece.seconds
        yield Sentence(speaker, tuple(words), at_other_speed(np.concatenate(parts), draw))


def copies(utterances: Sequence[dict[str, Any]], draw: random.Random, num_copies: int) -> Iterator[Sentence]:
    """Every utterance as it is, and again at other speeds."""
    for row in utterances:
        for number in range(num_copies):
            waveform = row["waveform"] if number == 0 else at_other_speed(row["waveform"], draw)
            yield Sentence(row["speaker"], tuple(row["text"].split()), waveform)


def at_other_speed(waveform: Waveform, draw: random.Random) -> Waveform:
    """The same faster or slower, higher or lower."""
    resampled: Waveform = soxr.resample(waveform, SAMPLING_RATE * draw.uniform(*SPEEDS), SAMPLING_RATE)
    return resampled


if __name__ == "__main__":
    main()

"""Start and end of each word of an utterance: hidden Markov models of whole words, learned from a flat start.

A word is a row of states, each of which is a Gaussian over cepstra. At first the loud frames of an utterance are shared
out evenly among the states of its words; then states are estimated from their frames, and frames are handed out again
along the best path through the states (Viterbi training; Rabiner, "A Tutorial on Hidden Markov Models and Selected
Applications in Speech Recognition", Proceedings of the IEEE 77(2), 1989). Between words there may be a pause, which is
a state too. It needs no dictionary, but texts in which the same words are said very often.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import librosa
import numpy as np
from numpy.typing import NDArray

SAMPLING_RATE = 16_000
FRAME = SAMPLING_RATE // 100
CEPSTRA = {"n_mfcc": 13, "n_fft": 400, "hop_length": FRAME, "n_mels": 40}
# Frames that a difference in time spans: the minimum length of an utterance.
DIFFERENCE_FRAMES = 9
NUM_ITERATIONS = 12
STATES_PER_SYLLABLE = 4
# Loudness from 0, the quietest twentieth of an utterance, to 1, its loudest. Frames above are speech, to begin with.
PERCENTILES = (5, 95)
SPEECH_LOUDNESS = 0.3
SMOOTHED_FRAMES = 5
# Frames of the whole corpus that are added to those of each state, because rare words have few.
PRIOR_FRAMES = 10.0

LETTER_SYLLABLES = {"W": 3}
VOWELS = "AEIOUY"
PAUSE = ("", 0)

Waveform = NDArray[np.float32]
# One row for each 10 ms.
Frames = NDArray[np.float64]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Utterance:
    """The features and the words of one utterance."""

    speaker: str
    words: tuple[str, ...]
    waveform: Waveform

    @property
    def seconds(self) -> float:
        """Duration of the word."""
        return len(self.waveform) / SAMPLING_RATE


@dataclass(frozen=True)
class Word:
    """A word and its frames of 10 ms, from `start` to `stop` (exclusive)."""

    text: str
    start: int
    stop: int


def align(utterances: Sequence[Utterance]) -> list[list[Word]]:
    """The words of every utterance, in their order.

    Raises:
        SystemExit: an utterance has fewer frames than its words have states.
    """
    chains = [Chain(utterance.words) for utterance in utterances]
    for utterance, chain in zip(utterances, chains, strict=True):
        if len(utterance.waveform) // FRAME < max(len(chain.states), DIFFERENCE_FRAMES):
            text = " ".join(utterance.words)
            raise SystemExit(
                f"{text!r} of {utterance.speaker} lasts {utterance.seconds:.2f} s, too short for its words."
            )
    features = normalize_speakers(utterances, [cepstra(utterance.waveform) for utterance in utterances])
    paths = [chain.flat_start(loudness(one.waveform)) for chain, one in zip(chains, utterances, strict=True)]
    for _ in range(NUM_ITERATIONS):
        gaussians = Gaussians(features, chains, paths)
        paths = [
            chain.best_path(gaussians.log_densities(frames, chain))
            for frames, chain in zip(features, chains, strict=True)
        ]
    return [chain.words_on(path) for chain, path in zip(chains, paths, strict=True)]


class Chain:
    """The states of an utterance: a pause, those of the first word, a pause, those of the second, and so on to a pause.

    states: of each, its word and its place in the word. word_numbers: of each, the number of its word, or -1.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self.states = [PAUSE]
        numbers = [-1]
        for number, word in enumerate(words):
            num_states = STATES_PER_SYLLABLE * syllables(word)
            self.states += [*((word, place) for place in range(num_states)), PAUSE]
            numbers += [number] * num_states + [-1]
        self.word_numbers = np.array(numbers)

    @cached_property
    def _after_pauses(self) -> Numbers:
        """First states of all words but the first; a path may enter them from two states before, skipping a pause."""
        return np.flatnonzero(self.word_numbers[1:-1] < 0) + 2

    def flat_start(self, loudness_of_frames: Frames) -> Numbers:
        """A path whose quiet frames are pauses and whose loud frames are divided evenly among the words."""
        states = np.flatnonzero(self.word_numbers >= 0)
        is_loud = loudness_of_frames > SPEECH_LOUDNESS
        num_loud = int(is_loud.sum())
        path = np.zeros(len(is_loud), dtype=np.int64)
        path[is_loud] = states[np.arange(num_loud) * len(states) // max(1, num_loud)]
        return path

    def best_path(self, log_densities: Frames) -> Numbers:
        """The state of each frame, `(num_frames,)`, for log densities `(num_frames, num_states)`."""
        num_frames, num_states = log_densities.shape
        scores = np.full(num_states, -np.inf)
        scores[:2] = log_densities[0, :2]
        steps = np.zeros((num_frames, num_states), dtype=np.int64)
        candidates = np.full((3, num_states), -np.inf)
        for frame in range(1, num_frames):
            candidates[0] = scores
            candidates[1, 1:] = scores[:-1]
            candidates[2, self._after_pauses] = scores[self._after_pauses - 2]
            steps[frame] = candidates.argmax(axis=0)
            scores = candidates.max(axis=0) + log_densities[frame]
        path = np.zeros(num_frames, dtype=np.int64)
        path[-1] = num_states - 2 + scores[-2:].argmax()
        for frame in range(num_frames - 1, 0, -1):
            path[frame - 1] = path[frame] - steps[frame, path[frame]]
        return path

    def words_on(self, path: Numbers) -> list[Word]:
        """The span of each word on a path."""
        numbers = self.word_numbers[path]
        frames = [np.flatnonzero(numbers == number) for number in range(len(self.words))]
        return [Word(word, int(own[0]), int(own[-1]) + 1) for word, own in zip(self.words, frames, strict=True)]


class Gaussians:
    """Mean and variances of each state's frames; the same for a state wherever it is."""

    def __init__(self, features: Sequence[Frames], chains: Sequence[Chain], paths: Sequence[Numbers]) -> None:
        known = {state: None for one in chains for state in one.states}
        self._numbers = {state: number for number, state in enumerate(known)}
        frames = np.concatenate(features)
        states = np.concatenate([self._numbers_of(one)[path] for one, path in zip(chains, paths, strict=True)])
        counts = np.bincount(states, minlength=len(known))[:, None]
        sums, squares = np.zeros((2, len(known), frames.shape[1]))
        np.add.at(sums, states, frames)
        np.add.at(squares, states, np.square(frames))
        total = counts + PRIOR_FRAMES
        self._means = (sums + PRIOR_FRAMES * frames.mean(axis=0)) / total
        self._variances = (squares + PRIOR_FRAMES * np.square(frames).mean(axis=0)) / total - np.square(self._means)

    def log_densities(self, frames: Frames, chain: Chain) -> Frames:
        """Log densities of each frame in each state of a chain, up to a common constant: `(frames, states)`."""
        used, places = np.unique(self._numbers_of(chain), return_inverse=True)
        means, variances = self._means[used], self._variances[used]
        distances = (
            np.square(frames) @ (1 / variances).T
            - 2 * frames @ (means / variances).T
            + (np.square(means) / variances + np.log(variances)).sum(axis=1)
        )
        densities: Frames = -0.5 * distances[:, places]
        return densities

    def _numbers_of(self, chain: Chain) -> Numbers:
        return np.array([self._numbers[state] for state in chain.states])


def cepstra(waveform: Waveform) -> Frames:
    """Mel-frequency cepstra with their first and second differences in time, `(num_frames, 39)`."""
    still: NDArray[Any] = librosa.feature.mfcc(y=waveform, sr=SAMPLING_RATE, **CEPSTRA)[:, : len(waveform) // FRAME]
    moving = [librosa.feature.delta(still, width=DIFFERENCE_FRAMES, order=order) for order in (1, 2)]
    return np.concatenate([still, *moving]).T.astype(np.float64)


def normalize_speakers(utterances: Sequence[Utterance], features: Sequence[Frames]) -> list[Frames]:
    """Features with mean 0 and variance 1 over each speaker's frames."""
    by_speaker: dict[str, list[Frames]] = defaultdict(list)
    for utterance, frames in zip(utterances, features, strict=True):
        by_speaker[utterance.speaker].append(frames)
    joined = {speaker: np.concatenate(own) for speaker, own in by_speaker.items()}
    scales = {speaker: (frames.mean(axis=0), frames.std(axis=0)) for speaker, frames in joined.items()}
    return [
        (frames - scales[utterance.speaker][0]) / scales[utterance.speaker][1]
        for utterance, frames in zip(utterances, features, strict=True)
    ]


def loudness(waveform: Waveform) -> Frames:
    """Loudness of each frame, on the scale of `PERCENTILES`."""
    whole = waveform[: len(waveform) // FRAME * FRAME].astype(np.float64).reshape(-1, FRAME)
    power = np.convolve(np.square(whole).mean(axis=1), np.full(SMOOTHED_FRAMES, 1 / SMOOTHED_FRAMES), mode="same")
    decibels = 10 * np.log10(power + 1e-10)
    quiet, loud = np.percentile(decibels, PERCENTILES)
    scaled: Frames = np.clip((decibels - quiet) / max(loud - quiet, 1.0), 0.0, 1.0)
    return scaled


def syllables(word: str) -> int:
    """Approximate number of syllables of a word."""
    if len(word) == 1:
        return LETTER_SYLLABLES.get(word, 1)
    groups = sum(a in VOWELS and b not in VOWELS for a, b in zip(word, word[1:] + "#", strict=True))
    return max(1, groups - word.endswith("E"))

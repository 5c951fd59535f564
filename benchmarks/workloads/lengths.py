"""Lengths of utterances and transcripts in corpora that are not available here, from published tables."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Durations of train-clean-100, percent of utterances and seconds: the table in icefall's LibriSpeech recipe
# (local/display_manifest_statistics.py). It counts each utterance at speeds 0.9, 1 and 1.1 too, which the ends show;
# so the longest one is replaced by that of the corpus itself.
_LIBRISPEECH_PERCENTILES = (
    (0.0, 1.3),
    (0.1, 1.9),
    (0.5, 2.2),
    (1.0, 2.5),
    (5.0, 4.2),
    (10.0, 6.4),
    (25.0, 11.4),
    (50.0, 13.8),
    (75.0, 15.3),
    (90.0, 16.7),
    (95.0, 17.3),
    (99.0, 18.1),
    (99.5, 18.4),
    (99.9, 18.8),
    (100.0, 24.5),
)
SHORTEST_SECONDS = _LIBRISPEECH_PERCENTILES[0][1]
# 9.4 million words in 960 hours (Panayotov et al., ICASSP 2015).
WORDS_PER_SECOND = 2.7
# English words in lower case in Voxtral's vocabulary, with the space before them.
TOKENS_PER_WORD = 1.3


def librispeech_durations(num_utterances: int, seed: int) -> NDArray[np.float64]:
    """Seconds of utterances drawn from the distribution: most between 11 and 17, a tail of short ones."""
    percents, seconds = np.array(_LIBRISPEECH_PERCENTILES).T
    durations: NDArray[np.float64] = np.interp(
        np.random.default_rng(seed).uniform(0, 100, num_utterances), percents, seconds
    )
    return durations


def text_tokens(durations: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    """Tokens of transcripts of read speech: proportional to the duration, with speakers that differ by 15 %."""
    speed = np.random.default_rng(seed).lognormal(0, 0.15, len(durations))
    return np.maximum(1, np.rint(durations * speed * WORDS_PER_SECOND * TOKENS_PER_WORD)).astype(np.int64)

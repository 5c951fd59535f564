"""Long recordings are cut into parts that cover them, where it is quiet."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from voxtral_dist.transcription.segmenter import cut_at_pauses

from corpora import tone

RATE = 16_000


@given(
    num_samples=st.integers(1, 6 * RATE),
    max_seconds=st.floats(1.0, 3.0),
    seed=st.integers(0, 3),
)
def test_parts_cover_the_recording_and_none_is_too_long(num_samples: int, max_seconds: float, seed: int) -> None:
    pcm = tone(6.0, seed=seed)[:num_samples]
    parts = list(cut_at_pauses(pcm, RATE, max_seconds))
    assert np.array_equal(np.concatenate([pcm[part] for part in parts]), pcm)
    assert all(part.stop - part.start <= max_seconds * RATE for part in parts)
    assert all(part.stop > part.start for part in parts[:-1])


def test_cuts_lie_in_pauses() -> None:
    pause = np.zeros(RATE // 2, dtype=np.int16)
    # Sentences of 2 s with pauses of 0.5 s: a part of at most 6 s holds two of them.
    pcm = np.concatenate([np.concatenate([tone(2.0, seed=seed), pause]) for seed in range(6)])
    parts = list(cut_at_pauses(pcm, RATE, 6.0))
    assert len(parts) == 3
    for part in parts[:-1]:
        assert 2.0 <= part.stop / RATE % 2.5 <= 2.5


def test_a_short_recording_is_one_part() -> None:
    assert list(cut_at_pauses(tone(2.0), RATE, 30.0)) == [slice(0, 2 * RATE)]

"""Padding and collation: nothing but the examples counts."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from voxtral_dist.data.examples.bad_utterance import BadUtterance
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.micro_batch import IGNORED_LABEL, collate, pad_left, weightless_micro_batch, windows_of
from voxtral_dist.model.prompts import VoxtralPrompts

PAD = 11
AUDIO = 24
WINDOW_SAMPLES = 4
# What collation reads of `VoxtralPrompts`.
IDS = cast(VoxtralPrompts, SimpleNamespace(pad_id=PAD, audio_id=AUDIO, window_samples=WINDOW_SAMPLES))


def example(prompt: list[int], completion: list[int], num_windows: int = 1, loudness: int = 1) -> Example:
    pcm = np.full(num_windows * WINDOW_SAMPLES, loudness, dtype=np.int16)
    duration_seconds = 0.5 * num_windows
    return Example(0, "key", pcm, num_windows, tuple(prompt), tuple(completion), "text", duration_seconds)


def test_pad_left_fills_before_the_sequences():
    ids, mask = pad_left([[1, 2, 3], [4], [5, PAD]], PAD)
    assert ids.tolist() == [[1, 2, 3], [PAD, PAD, 4], [PAD, 5, PAD]]
    # A pad id inside of a sequence is a token like any other.
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.int64)


def test_collate_pads_behind_and_finds_audio_and_targets():
    batch = collate(
        [example([1, AUDIO, AUDIO, 34], [7, 8, 2], 2, loudness=5), example([1, AUDIO, 34], [9, 2], loudness=6)], IDS
    )
    assert batch.input_ids.tolist() == [[1, AUDIO, AUDIO, 34, 7, 8], [1, AUDIO, 34, 9, PAD, PAD]]
    assert batch.positions_per_example == (6, 4)
    assert batch.audio_places.tolist() == [1, 2, 7]
    # Each position predicts the token behind it.
    assert (batch.target_places.tolist(), batch.target_ids.tolist()) == ([3, 4, 5, 8, 9], [7, 8, 2, 9, 2])
    ignored = IGNORED_LABEL
    assert batch.labels.tolist() == [[ignored] * 3 + [7, 8, 2], [ignored] * 2 + [9, 2] + [ignored] * 2]
    assert batch.pcm.tolist() == [[5] * 4, [5] * 4, [6] * 4]
    assert batch.windows_per_example == (2, 1)
    assert (batch.num_utterances, batch.audio_seconds, batch.num_target_tokens) == (2, 1.5, 5)


@pytest.mark.parametrize(("num_samples", "num_windows"), [(0, 1), (1, 1), (4, 1), (5, 2), (12, 3)])
def test_windows_are_filled_with_silence_behind_the_audio(num_samples, num_windows):
    pcm = np.arange(1, num_samples + 1, dtype=np.int16)
    clips = [replace(example([1], [2], num_windows), pcm=pcm), example([1], [2], loudness=7)]
    windows = windows_of(clips, WINDOW_SAMPLES)
    assert windows.shape == (num_windows + 1, WINDOW_SAMPLES)
    assert windows[:-1].flatten().tolist() == pcm.tolist() + [0] * (WINDOW_SAMPLES * num_windows - num_samples)
    assert windows[-1].tolist() == [7] * WINDOW_SAMPLES


def test_feature_masks_follow_the_windows_of_their_example():
    masks = np.array([[1, 0, 3, 9], [0, 1, 2, 4]])
    masked = [replace(example([1], [2], num_windows), feature_masks=masks) for num_windows in (2, 3)]
    batch = collate([masked[0], example([1], [2]), masked[1]], IDS)
    assert batch.feature_masks.tolist() == [[1, 0, 3, 9], [0, 1, 2, 4], [4, 0, 3, 9], [3, 1, 2, 4]]
    assert collate([example([1], [2])], IDS).feature_masks.shape == (0, 4)


def test_an_empty_transcript_trains_its_end_alone():
    batch = collate([example([1, 34], [2])], IDS)
    assert (batch.input_ids.tolist(), batch.labels.tolist(), batch.num_target_tokens) == (
        [[1, 34]],
        [[IGNORED_LABEL, 2]],
        1,
    )


@pytest.mark.parametrize("num_padding", [0, 3])
def test_padding_changes_neither_targets_nor_positions(num_padding):
    one = example([1, AUDIO, 34], [7, 8, 2])
    longer = example([1] * (3 + num_padding), [7, 8, 2])
    alone, padded = collate([one], IDS), collate([one, longer], IDS)
    width = alone.input_ids.shape[1]
    assert torch.equal(padded.input_ids[0, :width], alone.input_ids[0])
    assert torch.equal(padded.labels[0, :width], alone.labels[0])
    assert torch.equal(padded.target_places[: len(alone.target_places)], alone.target_places)
    assert padded.num_target_tokens == 2 * alone.num_target_tokens


def test_a_batch_keeps_its_bad_utterances():
    bad = BadUtterance("a.tar", "key", "does not decode")
    assert collate([example([1], [2])], IDS, [bad]).bad_utterances == (bad,)


def test_moving_a_batch_keeps_everything_but_the_device():
    batch = collate([example([1, 24, 34], [7, 2])], IDS, [BadUtterance("a.tar", "key", "reason")])
    moved = batch.to(torch.device("meta"))
    for name in ("input_ids", "audio_places", "target_places", "target_ids", "pcm", "feature_masks"):
        assert getattr(moved, name).device.type == "meta", name
        assert getattr(moved, name).shape == getattr(batch, name).shape
    assert (moved.windows_per_example, moved.audio_seconds) == (batch.windows_per_example, batch.audio_seconds)
    assert moved.bad_utterances == batch.bad_utterances


def test_a_weightless_micro_batch_runs_and_counts_for_nothing(prompts: VoxtralPrompts):
    bad = BadUtterance("a.tar", "key", "reason")
    batch = weightless_micro_batch(prompts, [bad])
    assert (batch.num_target_tokens, batch.num_utterances, batch.audio_seconds) == (0, 0, 0.0)
    assert batch.bad_utterances == (bad,)
    assert tuple(batch.input_ids[0].tolist()) == prompts.transcription(None, 1)
    assert batch.pcm.shape == (1, prompts.window_samples)
    assert not batch.pcm.any()
    assert (batch.labels == IGNORED_LABEL).all()
    # Its audio tokens carry the gradient, of value 0, through every module.
    assert len(batch.audio_places) == prompts.audio_tokens_per_window

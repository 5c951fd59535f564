"""Masked features are the features with rectangles of zeros; training sees them, and nothing else does."""

import numpy as np
import pytest
import torch

from voxtral_dist.config import ModelConfig, SpecAugmentConfig, TrainDataConfig
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.data.stored.index import ShardIndex
from voxtral_dist.engine.loss import LossOfMicroBatch
from voxtral_dist.model.features import LogMel, mask_features
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.weights import load_voxtral

from corpora import tone

WINDOWS, BINS, FRAMES = 5, 12, 40


def random_masks(num_masks: int, seed: int) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    axis = generator.integers(0, 2, num_masks)
    length = np.where(axis == 1, FRAMES, BINS)
    ends = np.sort(generator.integers(0, length[:, None] + 1, (num_masks, 2)), axis=1)
    return torch.from_numpy(np.column_stack([generator.integers(0, WINDOWS, num_masks), axis, ends]))


@pytest.mark.parametrize("num_masks", [0, 1, 3, 60])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_masking_equals_a_loop_over_masks(num_masks, seed):
    features = torch.rand((WINDOWS, BINS, FRAMES), generator=torch.Generator().manual_seed(seed)) + 1.0
    masks = random_masks(num_masks, seed)
    expected = features.clone()
    for window, axis, start, end in masks.tolist():
        if axis == 1:
            expected[window, :, start:end] = 0.0
        else:
            expected[window, start:end, :] = 0.0
    assert torch.equal(mask_features(features, masks), expected)


def test_masking_never_waits_for_the_device():
    # The meta device has shapes and no values: whatever asks for a value on the host fails on it.
    features = torch.empty((WINDOWS, BINS, FRAMES), device="meta")
    assert mask_features(features, random_masks(7, 0).to("meta")).shape == features.shape


def test_the_shape_of_the_features_is_that_of_the_prompts(tiny_model, prompts):
    log_mel = LogMel.from_pretrained(str(tiny_model), torch.device("cpu"))
    features = log_mel(torch.zeros((2, prompts.window_samples), dtype=torch.int16), [2])
    assert features.shape == (2, prompts.num_mel_bins, prompts.window_samples // prompts.hop_samples)


def loader_of(shard_folder, prompts, spec_augment=None):
    config = TrainDataConfig.model_validate(
        {
            "shards": [str(shard_folder)],
            "slots_per_step": 2,
            "max_examples": 4,
            "num_workers": 0,
            "spec_augment": spec_augment,
        }
    )
    return build_train_loader(config, prompts, seed=0, num_steps=20, rank=0, world_size=1)


def test_training_sees_masked_features(tiny_model, shard_folder, prompts: VoxtralPrompts):
    model = load_voxtral(ModelConfig(path=str(tiny_model), precision="float32")).eval()
    log_mel = LogMel.from_pretrained(str(tiny_model), torch.device("cpu"))
    seen = []
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_features"]), with_kwargs=True)
    masked = SpecAugmentConfig(max_time_mask_fraction=0.5)
    plain_step = next(iter(loader_of(shard_folder, prompts).starting_at(0)))
    masked_step = next(iter(loader_of(shard_folder, prompts, masked).starting_at(0)))
    loss = LossOfMicroBatch(log_mel, chunk_tokens=5)
    for plain, batch in zip(plain_step.micro_batches, masked_step.micro_batches, strict=True):
        assert torch.equal(plain.pcm, batch.pcm)
        assert (len(plain.feature_masks), len(batch.feature_masks) > 0) == (0, True)
        seen.clear()
        assert loss(model, plain) != loss(model, batch)
        assert torch.equal(seen[0], log_mel(plain.pcm, plain.windows_per_example))
        assert torch.equal(seen[1], mask_features(seen[0], batch.feature_masks))


def test_time_masks_of_the_loader_lie_inside_the_audio(shard_folder, prompts: VoxtralPrompts):
    masked = SpecAugmentConfig(num_time_masks=4, max_time_mask_fraction=0.5, num_frequency_masks=0)
    frames = prompts.window_samples // prompts.hop_samples
    num_masks = 0
    for batches in loader_of(shard_folder, prompts, masked).starting_at(0):
        for batch in batches.micro_batches:
            for window, _, start, end in batch.feature_masks.tolist():
                assert 0 <= start < end <= frames
                # Padding is digital silence, and tones have noise in every frame.
                assert batch.pcm[window, (end - 1) * prompts.hop_samples :].any()
                num_masks += 1
    assert num_masks > 100


def test_examples_of_evaluations_have_no_masks(shard_index: ShardIndex, prompts: VoxtralPrompts):
    assert UtteranceReader(shard_index, prompts, 448).example(0).feature_masks.shape == (0, 4)


def test_features_are_the_same_under_autocast(tiny_model, prompts):
    log_mel = LogMel.from_pretrained(str(tiny_model), torch.device("cpu"))
    pcm = torch.from_numpy(np.stack([tone(prompts.window_seconds, seed=number) for number in range(3)]))
    expected = log_mel(pcm, [2, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = log_mel(pcm, [2, 1])
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)

"""Features and masks on the device: the values of the CPU, in float32 whatever surrounds them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from voxtral_dist.model.features import LogMel, mask_features
from voxtral_dist.model.prompts import VoxtralPrompts

from corpora import tone
from fake_cuda import CUDA, CudaTensor, fake_cuda, log, values

WINDOWS_PER_CLIP = (1, 3, 1, 2)


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    with fake_cuda() as made:
        yield made


def to_device(tensor: Tensor) -> Tensor:
    return tensor.pin_memory().to(CUDA, non_blocking=True)


@pytest.fixture
def pcm(prompts: VoxtralPrompts) -> Tensor:
    clips = [tone(count * prompts.window_samples / 16_000, seed=count) for count in WINDOWS_PER_CLIP]
    return torch.cat([torch.from_numpy(clip).view(-1, prompts.window_samples) for clip in clips])


def features_on(device: torch.device, model: Path, pcm: Tensor) -> Tensor:
    return LogMel.from_pretrained(str(model), device)(pcm, WINDOWS_PER_CLIP)


def test_features_equal_the_cpus(tiny_model: Path, pcm: Tensor) -> None:
    features = features_on(CUDA, tiny_model, to_device(pcm))
    assert isinstance(features, CudaTensor)
    torch.testing.assert_close(features.real, features_on(torch.device("cpu"), tiny_model, pcm), rtol=0, atol=2e-5)


def test_features_stay_float32_inside_autocast(tiny_model: Path, pcm: Tensor) -> None:
    log_mel = LogMel.from_pretrained(str(tiny_model), CUDA)
    plain = log_mel(to_device(pcm), WINDOWS_PER_CLIP)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (on_device := to_device(torch.ones(2, 2))).matmul(on_device).dtype == torch.bfloat16
        features = log_mel(to_device(pcm), WINDOWS_PER_CLIP)
    assert features.dtype == torch.float32
    assert torch.equal(values(features), values(plain))
    # TensorFloat-32 would keep 10 bits of the products of filters and spectrum.
    assert torch.get_float32_matmul_precision() == "highest"


def test_masks_equal_the_cpus_and_wait_for_nothing() -> None:
    features = torch.rand(5, 12, 40)
    masks = torch.tensor([[0, 0, 2, 5], [0, 1, 10, 40], [3, 1, 0, 7], [4, 0, 0, 12]])
    masked = mask_features(to_device(features), to_device(masks))
    assert torch.equal(values(masked), mask_features(features, masks))
    assert not log.waits


def test_audio_and_masks_on_the_cpu_are_refused(tiny_model: Path, pcm: Tensor) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        features_on(CUDA, tiny_model, pcm)
    with pytest.raises(RuntimeError, match="same device"):
        mask_features(to_device(torch.rand(1, 4, 4)), torch.tensor([[0, 0, 2, 3]]))

"""The encoder in chunks gives the same embeddings and gradients, in memory that does not grow with the windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import VoxtralForConditionalGeneration

from voxtral_dist.config import ModelConfig
from voxtral_dist.model.encoder import ChunkedEncoder, num_chunks
from voxtral_dist.model.weights import load_voxtral

NUM_FRAMES = 128


def loaded(tiny_model: Path) -> VoxtralForConditionalGeneration:
    return load_voxtral(ModelConfig(path=str(tiny_model), precision="float32"))


def features(num_windows: int) -> Tensor:
    return torch.randn((num_windows, 128, NUM_FRAMES), generator=torch.Generator().manual_seed(num_windows))


def gradients(model: VoxtralForConditionalGeneration, embedded: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (embedded * torch.linspace(-1, 1, embedded.numel()).reshape(embedded.shape)).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("audio_tower" in name for name in found)
    return found


@pytest.mark.parametrize(
    ("windows", "per_chunk", "count"), [(1, 16, 1), (16, 16, 1), (17, 16, 2), (60, 16, 4), (0, 4, 1), (5, 1, 5)]
)
def test_as_many_chunks_as_the_windows_need(windows, per_chunk, count):
    assert num_chunks(windows, per_chunk) == count


@pytest.mark.parametrize(("num_windows", "chunks"), [(7, 2), (7, 7), (3, 5), (1, 4), (4, 1)])
def test_chunks_change_neither_embeddings_nor_gradients(tiny_model, num_windows, chunks):
    model = loaded(tiny_model)
    whole = model.model.get_audio_features(features(num_windows), return_dict=True).pooler_output
    expected = gradients(model, whole)
    encoder = ChunkedEncoder(model, windows_per_chunk=2)
    encoder.num_chunks = chunks
    parts = model.model.get_audio_features(features(num_windows), return_dict=True).pooler_output
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    found = gradients(model, parts)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Sums in another order: the rounding error is relative to the largest summand.
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()) + 1e-5)


@pytest.mark.parametrize(("num_windows", "chunks"), [(7, 3), (1, 4)])
def test_every_rank_runs_the_encoder_as_often_as_was_agreed(tiny_model, num_windows, chunks):
    model = loaded(tiny_model)
    encoder = ChunkedEncoder(model, windows_per_chunk=2)
    encoder.num_chunks = chunks
    sizes = []
    model.model.audio_tower.register_forward_hook(lambda module, given, made: sizes.append(len(given[0])))
    embedded = model.model.get_audio_features(features(num_windows), return_dict=True).pooler_output
    assert len(sizes) == chunks
    assert sum(sizes) == max(num_windows, chunks)
    embedded.sum().backward()
    # Each chunk is recomputed, also where its weight is zero.
    assert len(sizes) == 2 * chunks


def test_without_an_agreement_there_are_as_many_chunks_as_needed(tiny_model):
    model = loaded(tiny_model)
    whole = model.model.get_audio_features(features(5), return_dict=True).pooler_output
    ChunkedEncoder(model, windows_per_chunk=2)
    sizes = []
    model.model.audio_tower.register_forward_hook(lambda module, given, made: sizes.append(len(given[0])))
    with torch.no_grad():
        parts = model.get_audio_features(features(5), return_dict=True).pooler_output
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert sizes == [2, 2, 1]


def test_what_is_kept_for_the_backward_pass_grows_with_inputs_and_outputs_alone(tiny_model):
    model = loaded(tiny_model)

    def kept(num_windows: int) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            held = model.model.get_audio_features(features(num_windows), return_dict=True).pooler_output
            assert held.requires_grad
        return sum(sizes.values())

    growth_of_whole = (kept(16) - kept(8)) / 8
    ChunkedEncoder(model, windows_per_chunk=4)
    growth = (kept(16) - kept(8)) / 8
    in_and_out = features(1).nbytes + 16 * model.config.text_config.hidden_size * 4
    assert growth <= 1.1 * in_and_out
    assert growth_of_whole > 10 * in_and_out

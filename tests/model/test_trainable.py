"""Which parameters are trained: components, patterns and adapters, and the refusal of what matches nothing."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

from voxtral_dist.config import LoraConfig, ModelConfig, TrainableConfig
from voxtral_dist.errors import UserError
from voxtral_dist.model.trainable import COMPONENTS, component_of, count_parameters, is_adapter, parameter_table
from voxtral_dist.model.voxtral import TrainedVoxtral, trained_meta_model
from voxtral_dist.model.weights import load_voxtral

# Whisper's sinusoids, which the published class freezes.
FIXED = "model.audio_tower.embed_positions.weight"


def meta_model_of(tiny_model: Path, **trainable: Any) -> TrainedVoxtral:
    config = ModelConfig(path=str(tiny_model), precision="float32")
    return trained_meta_model(config, TrainableConfig(**trainable), torch.float32)


def trained(model: TrainedVoxtral) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_all_but_the_fixed_positions_are_trained_by_default(tiny_model):
    model = meta_model_of(tiny_model)
    assert trained(model) == {name for name, _ in model.named_parameters()} - {FIXED}


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_frozen_component_is_frozen_as_a_whole_and_no_other(tiny_model, component):
    model = meta_model_of(tiny_model, frozen=[component])
    names = {name for name, _ in model.named_parameters()} - {FIXED}
    assert trained(model) == {name for name in names if component_of(name) != component}
    assert len(trained(model)) < len(names)


def test_every_parameter_belongs_to_the_component_that_holds_it(tiny_model):
    model = meta_model_of(tiny_model)
    holders = {
        "encoder": model.model.audio_tower,
        "projector": model.model.multi_modal_projector,
        "language_model": model.model.language_model,
    }
    for component, holder in holders.items():
        inside = {id(parameter) for parameter in holder.parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) in inside:
                assert component_of(name) == component
    assert component_of("lm_head.weight") == "language_model"


def test_patterns_freeze_what_they_fit(tiny_model):
    pattern = "*.layers.0.*"
    model = meta_model_of(tiny_model, frozen=[pattern])
    names = {name for name, _ in model.named_parameters()} - {FIXED}
    assert trained(model) == {name for name in names if not fnmatchcase(name, pattern)}


@pytest.mark.parametrize("use_dora", [False, True])
def test_with_adapters_they_alone_and_whole_components_are_trained(tiny_model, use_dora):
    lora = LoraConfig(
        rank=3,
        use_dora=use_dora,
        targets={"encoder": ["q_proj", "fc1"], "language_model": ["down_proj"]},
        trained_whole=["projector"],
    )
    model = meta_model_of(tiny_model, lora=lora)
    names = {name for name, _ in model.named_parameters()}
    assert trained(model) == {name for name in names if is_adapter(name) or component_of(name) == "projector"}
    adapted = {name.partition(".lora_A.")[0].rpartition(".")[2] for name in names if ".lora_A." in name}
    assert adapted == {"q_proj", "fc1", "down_proj"}
    # `q_proj` of the encoder alone: the language model has layers of that name too.
    assert not any(is_adapter(name) and "language_model" in name and "q_proj" in name for name in names)
    assert any("lora_magnitude_vector" in name for name in names) == use_dora


def test_adapters_change_nothing_before_they_are_trained_and_are_the_same_for_a_seed(tiny_model):
    config = ModelConfig(path=str(tiny_model), precision="float32")
    lora = TrainableConfig(lora=LoraConfig(rank=2, use_dora=True))
    ids = torch.tensor([[1, 3, 300, 301, 302]])
    plain = load_voxtral(config).eval()(input_ids=ids).logits
    adapted = [load_voxtral(config, lora, seed) for seed in (0, 0, 1)]
    for model in adapted:
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, plain, rtol=1e-6, atol=1e-6)
    first, same, other = (
        torch.cat([value.flatten() for name, value in model.named_parameters() if ".lora_A." in name])
        for model in adapted
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert len(first.unique()) > 0.99 * len(first)


def test_the_table_counts_every_parameter_once(tiny_model):
    model = meta_model_of(tiny_model, lora=LoraConfig(rank=3, trained_whole=["projector"]))
    counts = count_parameters(model)
    sizes = [(name, parameter.requires_grad, parameter.numel()) for name, parameter in model.named_parameters()]
    for component, count in counts.items():
        mine = [row for row in sizes if component_of(row[0]) == component]
        assert count.adapters == sum(size for name, _, size in mine if is_adapter(name))
        assert count.frozen == sum(size for _, is_trained, size in mine if not is_trained)
        assert count.trained + count.adapters + count.frozen == sum(size for _, _, size in mine)
    lines = parameter_table(model)
    assert [line.split()[0] for line in lines] == ["parameters", *COMPONENTS, "all"]
    assert lines[-1].split()[1:] == [
        f"{sum(getattr(count, kind) for count in counts.values()):,}" for kind in ("trained", "adapters", "frozen")
    ]


@pytest.mark.parametrize(
    ("trainable", "sentence"),
    [
        ({"frozen": ["decoder"]}, "`trainable.frozen`: 'decoder' is not one of encoder, projector, language_model"),
        ({"frozen": ["*.layer.0.*"]}, "matches no parameter"),
        ({"frozen": COMPONENTS}, "leaves no parameter to train"),
        (
            {"lora": {"targets": {"encoder": ["o_proj"]}}},
            "`trainable.lora.targets.encoder`: 'o_proj' is not one of its linear layers",
        ),
        ({"lora": {"targets": {"language_model": ["lm_head"]}}}, "'lm_head' is not one of its linear layers"),
    ],
)
def test_what_fits_nothing_is_refused_by_name(tiny_model, trainable, sentence):
    with pytest.raises(UserError) as refusal:
        meta_model_of(tiny_model, **trainable)
    assert sentence in str(refusal.value)

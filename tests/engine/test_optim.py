"""Parameter groups and the learning rate schedule."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import VoxtralConfig

from voxtral_dist.config import OptimizerConfig
from voxtral_dist.engine.optim import learning_rate, parameter_groups, set_learning_rate
from voxtral_dist.model.trainable import COMPONENTS, component_of
from voxtral_dist.model.voxtral import meta_model

PEAK, NUM_STEPS = 2e-3, 111
DECAYING = OptimizerConfig(learning_rate=PEAK, weight_decay=0.1)


def config(schedule: str = "cosine", warmup_steps: int = 10, floor: float = 0.1) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=PEAK, warmup_steps=warmup_steps, schedule=schedule, final_learning_rate_fraction=floor
    )


def rates(settings: OptimizerConfig, num_steps: int = NUM_STEPS) -> list[float]:
    return [learning_rate(settings, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warmup_grows_by_equal_parts_and_its_last_step_is_the_peak(schedule):
    warming = rates(config(schedule))[:10]
    assert warming == pytest.approx([PEAK * part / 10 for part in range(1, 11)])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
def test_after_warmup_the_rate_falls_from_the_peak_to_the_floor(schedule, warmup_steps):
    settings = config(schedule, warmup_steps)
    falling = rates(settings)[warmup_steps:]
    assert falling[0] == pytest.approx(PEAK)
    assert all(later < earlier for earlier, later in pairwise(falling))
    assert falling[-1] == pytest.approx(0.1 * PEAK)


def test_constant_stays_at_the_peak():
    assert rates(config("constant"))[10:] == [PEAK] * 101


def test_half_way_the_rate_is_half_way_to_the_floor():
    half_way = PEAK * (1 + 0.1) / 2
    assert learning_rate(config("linear"), 60, NUM_STEPS) == pytest.approx(half_way)
    assert learning_rate(config("cosine"), 60, NUM_STEPS) == pytest.approx(half_way)


def test_cosine_follows_the_cosine():
    settings = config("cosine", warmup_steps=0, floor=0.0)
    expected = [PEAK * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(5)]
    assert rates(settings, num_steps=5) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_run_of_one_step_learns(schedule):
    assert rates(config(schedule, warmup_steps=0), num_steps=1) == pytest.approx([PEAK])


@pytest.fixture(scope="module")
def model(tiny_model) -> nn.Module:
    return meta_model(VoxtralConfig.from_pretrained(tiny_model))


def test_every_trainable_parameter_is_in_exactly_one_group(model):
    groups = parameter_groups(model, DECAYING)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(trainable)


def test_norms_biases_and_embeddings_do_not_decay(model):
    decay_of = {
        id(one): group["weight_decay"] for group in parameter_groups(model, DECAYING) for one in group["params"]
    }
    decays = {name: decay_of[id(one)] for name, one in model.named_parameters() if id(one) in decay_of}
    assert set(decays.values()) == {0.0, 0.1}
    for name, decay in decays.items():
        is_plain = "norm" in name or name.endswith(".bias") or "embed" in name
        assert decay == (0.0 if is_plain else 0.1), name


def test_frozen_parameters_are_in_no_group():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Embedding(4, 3))
    model[0].requires_grad_(False)
    grouped = [parameter for group in parameter_groups(model, DECAYING) for parameter in group["params"]]
    assert {id(one) for one in grouped} == {id(one) for one in [*model[1].parameters(), model[2].weight]}


def test_a_group_without_parameters_is_omitted():
    assert [group["weight_decay"] for group in parameter_groups(nn.LayerNorm(3), DECAYING)] == [0.0]


def test_a_parameter_emptied_by_zero_3_keeps_its_group():
    """Under stage 3 a weight has no elements, and its shape is in `ds_shape`."""
    model = nn.Linear(2, 3)
    model.weight.data = torch.empty(0)
    model.weight.ds_shape, model.bias.ds_shape = torch.Size([3, 2]), torch.Size([3])
    decayed, plain = parameter_groups(model, DECAYING)
    assert (decayed["weight_decay"], [id(one) for one in decayed["params"]]) == (0.1, [id(model.weight)])
    assert [id(one) for one in plain["params"]] == [id(model.bias)]


def test_components_with_a_rate_of_their_own_keep_its_proportion(model):
    settings = OptimizerConfig(
        learning_rate=PEAK, component_learning_rates={"encoder": PEAK / 10, "projector": PEAK * 3}
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), lr=PEAK)
    set_learning_rate(optimizer, PEAK / 2)
    rate_of = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
    rates = {component: set() for component in COMPONENTS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rates[component_of(name)].add(rate_of[id(parameter)])
    expected = {"encoder": PEAK / 20, "projector": PEAK * 1.5, "language_model": PEAK / 2}
    assert {component: pytest.approx(expected[component]) for component in rates} == {
        component: one for component, [one] in rates.items()
    }

"""Training in emulated float8: the same roundings on any number of ranks, and full precision in what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from voxtral_dist.checkpoints.loading import checkpoint_weights, load_checkpoint
from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.model import float8
from voxtral_dist.model.weights import load_voxtral

import test_checkpoint
from ranks import run_ranks
from runs import run_config
from test_equations import CHECKPOINTED, NUM_STEPS, Curve, Weights, logits_in_decoding, train_plainly, train_sharded

pytest.importorskip("torchao")
# Number of ranks, and settings of section `engine` and of section `model`. Under ZeRO, three ranks multiply gradients
# by three before they are rounded, and one process does not.
VARIANTS = [
    pytest.param(2, {"fsdp2": {}}, CHECKPOINTED, id="FSDP2 on 2 ranks"),
    pytest.param(2, {"stage": 2}, {}, id="ZeRO-2 on 2 ranks", marks=pytest.mark.slow),
    pytest.param(3, {"fsdp2": {"reshard_after_forward": False}}, {}, id="FSDP2 on 3 ranks", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def config(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("run")
    return run_config(folder, tiny_model, shard_folder, num_steps=NUM_STEPS, slots_per_step=5, stage=2)


def in_float8(
    config: RunConfig, engine: dict[str, Any], model: dict[str, Any], run_dir: Path | None = None
) -> RunConfig:
    tree = config.model_dump()
    tree["model"] |= {"float8": "rowwise_emulated", **model}
    chosen = {"engine": engine} if "fsdp2" in engine else {}
    return RunConfig.model_validate(tree | chosen | {"run_dir": run_dir or config.run_dir})


@pytest.fixture(scope="module")
def plain(config: RunConfig) -> dict[bool, tuple[Curve, Weights]]:
    """The run of one process, by whether it rounds."""
    return {
        rounds: train_plainly(run, load_voxtral(run.model, run.trainable, run.seed))
        for rounds, run in ((True, in_float8(config, {}, {})), (False, config))
    }


def test_rounding_changes_a_run_by_little(plain: dict[bool, tuple[Curve, Weights]]) -> None:
    rounded, exact = torch.tensor(plain[True][0]), torch.tensor(plain[False][0])
    difference = ((rounded - exact) / exact).abs()
    assert (difference > 1e-6).all()
    assert difference.max() < 0.05


@pytest.mark.parametrize(("world_size", "engine", "model"), VARIANTS)
def test_any_number_of_ranks_rounds_like_one_process(
    config: RunConfig,
    plain: dict[bool, tuple[Curve, Weights]],
    world_size: int,
    engine: dict[str, Any],
    model: dict[str, Any],
) -> None:
    expected = torch.tensor(plain[True][0])
    for curve, weights in run_ranks(world_size, train_sharded, in_float8(config, engine, model)):
        difference = ((torch.tensor(curve) - expected) / expected).abs()
        # Before the first update only the order of sums differs. Later, values near the middle of two are rounded to
        # either.
        assert difference[0].max() < 1e-5
        assert difference.max() < 0.01
        assert all(one.dtype == torch.float32 for one in weights.values())


def train_and_decode(world: World, config: RunConfig, last_step: int) -> tuple[Weights, tuple[Tensor, Tensor]]:
    return test_checkpoint.train_to(world, config, last_step)[1], logits_in_decoding(world, config)


def test_checkpoints_hold_float32_weights_and_nothing_else_needs_torchao(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = in_float8(config, {"fsdp2": {}}, {}, tmp_path)
    states, (whole, sharded) = run_ranks(1, train_and_decode, run, 2)[0]
    assert torch.equal(whole, sharded)
    with torch.no_grad():
        initial = load_voxtral(config.model)(input_ids=torch.arange(300, 320)[None]).logits
    torch.testing.assert_close(whole, initial)
    # A machine that evaluates and exports need not have it.
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    folder = str(tmp_path / "checkpoints" / "step-0000002")
    exported = dict(checkpoint_weights(folder))
    assert all(one.dtype == torch.float32 for one in exported.values())
    assert all(torch.equal(exported[name], one) for name, one in states.items() if "//" not in name)
    loaded = load_checkpoint(folder, torch.device("cpu"), "auto")
    assert all(torch.equal(exported[name], one) for name, one in loaded.named_parameters())


@pytest.mark.slow
def test_a_resumed_run_is_the_unbroken_one(config: RunConfig, tmp_path: Path) -> None:
    unbroken, broken = (in_float8(config, {"fsdp2": {}}, {}, tmp_path / name) for name in ("unbroken", "broken"))
    losses, states = run_ranks(2, test_checkpoint.train_to, unbroken, NUM_STEPS)[0]
    first = run_ranks(2, test_checkpoint.train_to, broken, 2)[0]
    rest = run_ranks(2, test_checkpoint.train_to, broken, NUM_STEPS)[0]
    assert first[0] + rest[0] == losses
    assert all(torch.equal(rest[1][name], one) for name, one in states.items())

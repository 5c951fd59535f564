"""Options of DeepSpeed's file work or are refused: sharded building, stage 0, adapters, float16, Muon, ZeRO++."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.build import check_engine
from voxtral_dist.errors import UserError
from voxtral_dist.model.weights import InitialWeights, load_voxtral

import test_checkpoint
import test_equations
from ranks import run_ranks
from runs import run_config

LAST_STEP = test_equations.NUM_STEPS


@pytest.fixture(scope="module")
def config(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return run_config(tmp_path_factory.mktemp("run"), tiny_model, shard_folder, num_steps=LAST_STEP, slots_per_step=3)


def with_zero(config: RunConfig, folder: Path, zero: dict[str, Any], **sections: Any) -> RunConfig:
    """The same run with other settings of DeepSpeed, and some other sections."""
    file = folder / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    tree = config.model_dump()
    for name, section in ({"engine": {"deepspeed": file}, "run_dir": folder / "run"} | sections).items():
        tree[name] = tree[name] | section if isinstance(section, dict) else section
    return RunConfig.model_validate(tree)


def build_sharded(world: World, config: RunConfig) -> dict[str, tuple[bool, tuple[int, ...], int, torch.Tensor]]:
    """For each parameter: whether it is trained, its shape, the size of this rank's partition, the gathered value."""
    import deepspeed

    from voxtral_dist.engine.zero.building import fill_model
    from voxtral_dist.engine.zero.settings import complete_settings, read_settings
    from voxtral_dist.model.voxtral import trained_meta_model

    model = trained_meta_model(config.model, config.trainable, torch.float32)
    settings = read_settings(config.engine, config.run_dir)
    settings = complete_settings(settings, config.model, config.optimizer, model, world.size)
    fill_model(model, InitialWeights(config.model.path, model, config.seed), settings, world)
    built = {}
    for name, parameter in model.named_parameters():
        own, shape = parameter.ds_tensor.numel(), tuple(parameter.ds_shape)
        assert parameter.numel() == 0, f"{name} is not sharded"
        with deepspeed.zero.GatheredParameters([parameter]):
            built[name] = (parameter.requires_grad, shape, own, parameter.detach().clone())
    return built


def test_a_model_that_is_built_sharded_is_the_stored_one(config: RunConfig, tmp_path: Path) -> None:
    trainable = {"frozen": ["projector"], "lora": {"rank": 4, "use_dora": True, "trained_whole": ["encoder"]}}
    adapted = with_zero(config, tmp_path, {"stage": 3}, trainable=trainable)
    whole = dict(load_voxtral(adapted.model, adapted.trainable, adapted.seed).named_parameters())
    for built in run_ranks(2, build_sharded, adapted):
        assert built.keys() == whole.keys()
        for name, (is_trained, shape, own, value) in built.items():
            assert (is_trained, shape) == (whole[name].requires_grad, tuple(whole[name].shape)), name
            assert own == -(-whole[name].numel() // 2), name
            assert torch.equal(value, whole[name]), name


def train_in_float16(world: World, config: RunConfig, first_scale_power: int) -> tuple[list[float], dict[str, float]]:
    """Run `train_and_resume` with a DeepSpeed that believes in float16 on CPUs, where torch computes it slowly."""
    from deepspeed.accelerator import get_accelerator

    from voxtral_dist.engine.zero import settings as zero_settings

    get_accelerator().is_fp16_supported = lambda: True
    zero_settings._FLOAT16["initial_scale_power"] = first_scale_power
    return train_and_resume(world, config)[:2]


def train_and_resume(
    world: World, config: RunConfig, tolerance: float = 0.0
) -> tuple[list[float], dict[str, float], list[str]]:
    """Losses, scalars and state names of a run that never stops; one that stops half-way must end the same."""
    unbroken = config.model_copy(update={"run_dir": config.run_dir / "unbroken"})
    broken = config.model_copy(update={"run_dir": config.run_dir / "broken"})
    losses, states = test_checkpoint.train_to(world, unbroken, LAST_STEP)
    first, _ = test_checkpoint.train_to(world, broken, 3)
    rest, resumed = test_checkpoint.train_to(world, broken, LAST_STEP)
    assert first + rest == pytest.approx(losses, rel=tolerance, abs=0.0)
    assert states.keys() == resumed.keys()
    for name, state in states.items():
        assert float((state - resumed[name]).abs().max()) <= tolerance, name
    saved = sorted(unbroken.run_dir.glob("checkpoints/*/complete.json"))[-1]
    return losses, json.loads(saved.read_text())["scalars"], sorted(states)


def train_in_float16_one_after_the_other(
    world: World, configs: list[RunConfig], first_scale_power: int
) -> list[tuple[list[float], dict[str, float]]]:
    return [train_in_float16(world, config, first_scale_power) for config in configs]


@pytest.mark.slow
def test_float16_skips_steps_that_overflow_and_resumes_to_the_last_digit(config: RunConfig, tmp_path: Path) -> None:
    halves = []
    for stage in (2, 3):
        (tmp_path / str(stage)).mkdir()
        halves.append(with_zero(config, tmp_path / str(stage), {"stage": stage}, model={"precision": "float16"}))
    # With a scale of 2^18, gradients of this model are near the largest float16; with 2^20 the first step overflows.
    for losses, scalars in run_ranks(2, train_in_float16_one_after_the_other, halves, 20)[0]:
        num_skipped = scalars["num_skipped_steps"]
        assert 1 <= num_skipped < LAST_STEP
        assert scalars["loss_scale"] == 2.0 ** (20 - num_skipped)
        # Since the last skipped one.
        assert 0 <= scalars["num_good_steps"] <= LAST_STEP - num_skipped
        assert losses[-1] < losses[0]


@pytest.mark.slow
def test_float16_follows_float32(config: RunConfig, tmp_path: Path) -> None:
    half = with_zero(config, tmp_path, {"stage": 3}, model={"precision": "float16"})
    losses, scalars = run_ranks(2, train_in_float16, half, 8)[0]
    assert scalars["num_skipped_steps"] == 0
    expected, _ = test_equations.train_plainly(config)
    assert losses == pytest.approx([loss for loss, _ in expected], rel=5e-3)


@pytest.mark.slow
def test_muon_moves_matrices_as_far_as_adamw_and_resumes_to_the_last_digit(config: RunConfig, tmp_path: Path) -> None:
    muon = with_zero(config, tmp_path, {"stage": 3}, optimizer={"algorithm": "muon", "max_grad_norm": 0.0})
    losses, _, states = run_ranks(2, train_and_resume, muon)[0]
    assert losses[-1] < losses[0]
    moments = {name.partition("//")[0]: name.partition("//")[2] for name in states if "//" in name}
    matrix = "model.language_model.layers.0.mlp.up_proj.weight"
    assert moments[matrix] == "momentum_buffer"
    assert moments["lm_head.weight"] == "exp_avg_sq"
    assert moments["model.language_model.layers.0.input_layernorm.weight"] == "exp_avg_sq"


@pytest.mark.slow
def test_secondary_groups_of_zero_plus_plus_equal_one_plain_process_and_resume(
    config: RunConfig, tmp_path: Path
) -> None:
    zero = {"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    grouped = with_zero(config, tmp_path, zero, train_data={"slots_per_step": 5})
    for result in run_ranks(4, test_equations.train_sharded, grouped):
        test_equations.assert_same(result, test_equations.train_plainly(grouped))
    run_ranks(4, train_and_resume, grouped)


@pytest.mark.parametrize(
    ("zero", "sections", "sentence"),
    [
        (
            {"stage": 3},
            {"model": {"compile_blocks": True}},
            "`model.compile_blocks: true` is not possible, because ZeRO-3",
        ),
        ({"stage": 0}, {"model": {"precision": "bfloat16"}}, "choose stage 1"),
        ({"stage": 4}, {}, "must be 0, 1, 2 or 3, but is 4"),
        ({"stage": 1, "overlap_comm": True}, {}, "`overlap_comm`"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, {}, "needs stage 3"),
        ({"stage": 3, "reduce_bucket_sise": 1}, {}, "`zero_optimization.reduce_bucket_sise`"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, {}, "`engine.nvme_dir` must name a folder"),
        (
            {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "."}},
            {"optimizer": {"ema_decay": 0.9}},
            "`optimizer.ema_decay` needs the optimizer's weights in memory",
        ),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, "`stage3_prefetch_bucket_size` in"),
        ({"stage": 3}, {"optimizer": {"algorithm": "muon"}}, "`optimizer.max_grad_norm` must be 0"),
        ({"stage": 2}, {"optimizer": {"algorithm": "muon"}}, "muon needs ZeRO-3"),
        ({"stage": 2}, {"optimizer": {"algorithm": "adamw_8bit"}}, "adamw_8bit needs `engine.fsdp2`"),
        ({"stage": 3}, {"optimizer": {"master_weights": False}}, "`optimizer.master_weights: false` needs `engine"),
        ({"stage": 3}, {"model": {"precision": "float16"}}, "does not support float16 on this device"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_before_a_model_is_built(
    config: RunConfig,
    tmp_path: Path,
    zero: dict[str, Any],
    sections: dict[str, Any],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(UserError) as refusal:
        check_engine(with_zero(config, tmp_path, zero, **sections))
    assert sentence in str(refusal.value)


def test_nvme_without_libaio_is_refused_before_a_model_is_built(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepspeed.ops.op_builder.cpu.AsyncIOBuilder.is_compatible", lambda self: False)
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme"}}
    offloaded = with_zero(
        config, tmp_path, zero, engine={"nvme_dir": tmp_path, "deepspeed": tmp_path / "deepspeed.json"}
    )
    with pytest.raises(UserError, match="needs libaio"):
        check_engine(offloaded)

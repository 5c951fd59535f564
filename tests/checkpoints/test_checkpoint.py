"""A run resumes exactly from a checkpoint, on any number of ranks and any engine, and refuses checkpoints of others."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from voxtral_dist.checkpoints.identity import data_identity, refuse_other_data
from voxtral_dist.config import (
    EngineConfig,
    Fsdp2Config,
    LoraConfig,
    OptimizerConfig,
    RunConfig,
    TrainableConfig,
)
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.data.training_set import build_training_set
from voxtral_dist.distributed.collectives import from_first_rank, gather_on_first
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine
from voxtral_dist.errors import UserError
from voxtral_dist.launching.run_facts import planned_save_seconds
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.tiny import build_tiny_voxtral
from voxtral_dist.model.weights import load_voxtral
from voxtral_dist.text import steps

from corpora import TINY_SHAPE
from ranks import run_ranks
from runs import run_config

LAST_STEP = 6
SAVED_STEP = 3

# Losses, and all weights, moments and averages by name.
State = tuple[list[float], dict[str, torch.Tensor]]


def train_to(world: World, config: RunConfig, last_step: int) -> State:
    """Resume if there is a checkpoint, train, save; the losses of these steps and all state at the end."""
    from voxtral_dist.checkpoints.directory import CheckpointDirectory, latest_step
    from voxtral_dist.checkpoints.progress import TrainProgress
    from voxtral_dist.engine.build import build_engine
    from voxtral_dist.train import build_train_step

    config.run_dir.mkdir(parents=True, exist_ok=True)
    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, last_step, world.rank, world.size)
    log_mel = LogMel.from_pretrained(config.model.path, world.device)
    engine = build_engine(config, log_mel, world)
    checkpoints = CheckpointDirectory(config, loader.training_set.fingerprint, world)
    progress = checkpoints.load(engine, latest_step(config.run_dir, world))
    train_step = build_train_step(config, engine, world)
    losses = [train_step.run(batches).metrics.loss for batches in loader.starting_at(progress.step)]
    checkpoints.save(engine, TrainProgress(step=last_step))
    return losses, union_over_ranks(own_states(engine), world)


def own_states(engine: Engine) -> dict[str, torch.Tensor]:
    """The weights, moments and averages of the parameters that this rank writes, by name."""
    states = {}
    for state in engine.parameter_states():
        states |= {state.name: state.weight}
        states |= {f"{state.name}//{key}": moment for key, moment in state.moments.items()}
        states |= {f"{state.name}//ema": state.average} if state.average is not None else {}
    return states


def union_over_ranks(own: dict[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """The tensors of all ranks by name; no two ranks have the same."""
    of_ranks = from_first_rank(gather_on_first(own, world), world)
    union = {name: tensor for of_rank in of_ranks for name, tensor in of_rank.items()}
    assert len(union) == sum(map(len, of_ranks))
    return union


def with_fsdp2(config: RunConfig, run_dir: Path) -> RunConfig:
    return config.model_copy(update={"run_dir": run_dir, "engine": EngineConfig(fsdp2=Fsdp2Config())})


def with_engine(config: RunConfig, name: str, run_dir: Path) -> RunConfig:
    return with_fsdp2(config, run_dir) if name == "fsdp2" else with_stage(config, int(name), run_dir)


def with_stage(config: RunConfig, stage: int, run_dir: Path) -> RunConfig:
    file = config.engine.deepspeed.with_name(f"zero{stage}.json")
    return config.model_copy(
        update={"run_dir": run_dir, "engine": config.engine.model_copy(update={"deepspeed": file})}
    )


@pytest.fixture(scope="module")
def config(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = run_config(tmp_path_factory.mktemp("run"), tiny_model, shard_folder, num_steps=LAST_STEP, slots_per_step=3)
    return with_decay(config, 0.7)


def with_decay(config: RunConfig, ema_decay: float | None) -> RunConfig:
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"ema_decay": ema_decay})})


@pytest.fixture(scope="module")
def saved(config: RunConfig) -> Path:
    """The folder of a run by two ranks under stage 3 that stopped half-way."""
    run_ranks(2, train_to, config, SAVED_STEP)
    return config.run_dir


@pytest.fixture(scope="module")
def unbroken(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> State:
    """The run that never stopped."""
    return run_ranks(2, train_to, with_stage(config, 3, tmp_path_factory.mktemp("unbroken")), LAST_STEP)[0]


@pytest.fixture(scope="module")
def saved_by_fsdp2(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by FSDP2, in partitions."""
    folder = tmp_path_factory.mktemp("fsdp2")
    run_ranks(2, train_to, with_fsdp2(config, folder), SAVED_STEP)
    return folder


@pytest.mark.parametrize(
    ("saver", "engine", "world_size"),
    # The whole matrix is in `test_resume_matrix.py`.
    [
        ("saved", "3", 2),
        ("saved", "fsdp2", 1),
        ("saved_by_fsdp2", "3", 1),
        ("saved_by_fsdp2", "fsdp2", 3),
    ],
)
def test_resuming_on_other_ranks_or_engines_is_the_unbroken_run(
    config: RunConfig,
    saver: str,
    unbroken: State,
    engine: str,
    world_size: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    shutil.copytree(request.getfixturevalue(saver), tmp_path / "run")
    for losses, states in run_ranks(world_size, train_to, with_engine(config, engine, tmp_path / "run"), LAST_STEP):
        assert losses == pytest.approx(unbroken[0][SAVED_STEP:], rel=1e-5)
        assert states.keys() == unbroken[1].keys()
        assert any(name.endswith("//ema") for name in states)
        for name, expected in unbroken[1].items():
            difference = float((states[name] - expected).abs().max())
            assert difference < 2e-6, f"{name} differs by {difference}"


def add_and_remove_averages(world: World, config: RunConfig) -> None:
    """Resume without averages, save, and resume with them under each engine: they start from the weights."""
    from voxtral_dist.checkpoints.directory import CheckpointDirectory
    from voxtral_dist.engine.build import build_engine

    log_mel = LogMel.from_pretrained(config.model.path, world.device)
    # Each saves what the next one loads; the first loads averages of a run that has trained.
    for number, (engine_kind, decay) in enumerate([("fsdp2", None), ("2", 0.9), ("3", None), ("fsdp2", 0.9)]):
        run = with_decay(with_engine(config, engine_kind, config.run_dir), decay)
        checkpoints = CheckpointDirectory(run, "", world)
        checkpoints._data_identity = {}
        engine = build_engine(run, log_mel, world)
        progress = checkpoints.load(engine, SAVED_STEP + number)
        for state in engine.parameter_states():
            if decay is None:
                assert state.average is None
            else:
                assert state.average is not None
                assert torch.equal(state.average, state.weight), "no stored average"
        checkpoints.save(engine, replace(progress, step=progress.step + 1))


@pytest.mark.parametrize("saver", ["saved", "saved_by_fsdp2"])
def test_averages_are_added_to_a_run_or_removed_from_it(
    config: RunConfig, saver: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    shutil.copytree(request.getfixturevalue(saver), tmp_path / "run")
    run_ranks(1, add_and_remove_averages, config.model_copy(update={"run_dir": tmp_path / "run"}))


def saved_in_background(world: World, config: RunConfig) -> list[list[str]]:
    """The tensors, under each engine, that a save in the background did not store as they were when it began."""
    from voxtral_dist.checkpoints.directory import CheckpointDirectory
    from voxtral_dist.checkpoints.progress import TrainProgress
    from voxtral_dist.engine.build import build_engine
    from voxtral_dist.train import build_train_step

    def states() -> dict[str, torch.Tensor]:
        return {
            f"{state.name}//{key}": tensor.clone()
            for state in engine.parameter_states()
            for key, tensor in {"weight": state.weight, **state.moments}.items()
        }

    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    log_mel = LogMel.from_pretrained(config.model.path, world.device)
    different = []
    for kind in ("2", "fsdp2"):
        run = with_engine(config, kind, config.run_dir / kind)
        if world.is_first:
            run.run_dir.mkdir()
        loader = build_train_loader(run.train_data, prompts, run.seed, LAST_STEP, world.rank, world.size)
        engine = build_engine(run, log_mel, world)
        step, batches = build_train_step(run, engine, world), loader.starting_at(0)
        checkpoints = CheckpointDirectory(run, loader.training_set.fingerprint, world)
        step.run(next(batches))
        before = states()
        checkpoints.start(engine, TrainProgress(step=1), in_background=True)
        step.run(next(batches))
        assert any(not torch.equal(tensor, before[name]) for name, tensor in states().items()), "it trains on"
        checkpoints.finish()
        checkpoints.load(engine, 1)
        different.append([name for name, tensor in states().items() if not torch.equal(tensor, before[name])])
    return different


def test_a_save_in_the_background_stores_the_state_of_the_moment_when_it_began(
    config: RunConfig, tmp_path: Path
) -> None:
    run = config.model_copy(update={"run_dir": tmp_path})
    assert run_ranks(2, saved_in_background, run) == 2 * [[[], []]]


@pytest.fixture(scope="module")
def fingerprint(config: RunConfig, prompts: VoxtralPrompts) -> str:
    return build_training_set(config.train_data, prompts, config.seed).fingerprint


class FrozenShapes:
    """The part of an engine that refusals need: they come before anything is loaded."""

    def __init__(self, model: Path) -> None:
        from voxtral_dist.config import ModelConfig

        loaded = load_voxtral(ModelConfig(path=str(model), precision="float32"))
        self._shapes = {
            name: tuple(parameter.shape) for name, parameter in loaded.named_parameters() if parameter.requires_grad
        }

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes


def refused_sentence(config: RunConfig, model: Path, fingerprint: str) -> str:
    from voxtral_dist.checkpoints.directory import CheckpointDirectory, latest_step
    from voxtral_dist.distributed.world import alone

    engine: Any = FrozenShapes(model)
    with pytest.raises(UserError) as refusal:
        CheckpointDirectory(config, fingerprint, alone("cpu")).load(engine, latest_step(config.run_dir, alone("cpu")))
    return str(refusal.value)


def test_a_checkpoint_of_another_model_is_refused(
    config: RunConfig, saved: Path, tmp_path: Path, fingerprint: str
) -> None:
    build_tiny_voxtral(tmp_path / "other", replace(TINY_SHAPE, text_layers=1))
    sentence = refused_sentence(config, tmp_path / "other", fingerprint)
    assert "belongs to another model" in sentence
    assert "layers.1" in sentence


def test_a_checkpoint_of_other_batches_or_data_is_refused(
    config: RunConfig, saved: Path, tiny_model: Path, fingerprint: str
) -> None:
    other = config.model_copy(update={"train_data": config.train_data.model_copy(update={"slots_per_step": 4})})
    assert "`train_data.slots_per_step` = 3, but it is 4 now" in refused_sentence(other, tiny_model, fingerprint)
    assert "`fingerprint of the shards, their index and the context word list` = " in refused_sentence(
        config, tiny_model, "of other shards"
    )


def test_a_checkpoint_of_another_version_of_a_text_step_is_refused(
    tmp_path: Path, own: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = own("def f(text):\n    return text\n")
    plain = run_config(tmp_path, tmp_path, tmp_path, num_steps=9)
    train_data = plain.train_data.model_copy(update={"target_text": ("lower_case", f"{module}:f")})
    config = plain.model_copy(update={"train_data": train_data})
    before = json.loads(json.dumps(data_identity(config, "")))
    refuse_other_data(Path("step-1"), before, data_identity(config, ""))
    # As a new process would find it.
    Path(f"{module}.py").write_text("def f(text):\n    return text.lower() + '!'\n")
    monkeypatch.delitem(sys.modules, module)
    steps._own_step.cache_clear()
    with pytest.raises(UserError, match=rf"`train_data.target_text` = \['lower_case', '{module}:f-\w{{12}}'\], but it"):
        refuse_other_data(Path("step-1"), before, data_identity(config, ""))


def test_a_checkpoint_of_another_training_is_refused(
    config: RunConfig, saved: Path, tiny_model: Path, fingerprint: str, tmp_path: Path
) -> None:
    adapted = config.model_copy(update={"trainable": TrainableConfig(lora=LoraConfig())})
    assert "`trainable` = {'frozen': [], 'lora': None}" in refused_sentence(adapted, tiny_model, fingerprint)
    moved = OptimizerConfig(learning_rate=1e-3, algorithm="muon")
    other = config.model_copy(update={"optimizer": moved})
    assert "`optimizer.algorithm` = 'adamw', but it is 'muon' now" in refused_sentence(other, tiny_model, fingerprint)
    build_tiny_voxtral(tmp_path / "other", TINY_SHAPE, seed=1)
    model = config.model.model_copy(update={"path": str(tmp_path / "other")})
    begun = config.model_copy(update={"model": model})
    assert "`fingerprint of the weights of model.path`" in refused_sentence(begun, tiny_model, fingerprint)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    config: RunConfig, saved: Path, tiny_model: Path, tmp_path: Path, fingerprint: str, caplog: pytest.LogCaptureFixture
) -> None:
    from voxtral_dist.checkpoints.directory import latest_step
    from voxtral_dist.distributed.world import alone

    shutil.copytree(saved, tmp_path / "run")
    whole = next((tmp_path / "run").glob("checkpoints/step-*"))
    newer = whole.with_name("step-0000009")
    shutil.copytree(whole, newer)
    cut = next(newer.glob("state-00001-*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-1])
    moved = config.model_copy(update={"run_dir": tmp_path / "run"})
    assert latest_step(moved.run_dir, alone("cpu")) == SAVED_STEP
    assert f"{newer} is damaged: {cut.name}" in caplog.text
    newer.with_name(f"damaged-{newer.name}").rename(newer)
    shutil.rmtree(whole)
    assert "No other checkpoint is left" in refused_sentence(moved, tiny_model, fingerprint)


def test_a_checkpoint_is_as_large_as_planned(config: RunConfig, saved: Path) -> None:
    """Headers of files are not planned."""
    (folder,) = (saved / "checkpoints").glob("step-*")
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert planned_save_seconds(config) == pytest.approx(stored / 1e9, rel=0.03)


def test_a_folder_without_complete_json_does_not_exist(config: RunConfig, saved: Path, tmp_path: Path) -> None:
    from voxtral_dist.checkpoints.directory import latest_step
    from voxtral_dist.distributed.world import alone

    shutil.copytree(saved, tmp_path / "run")
    folder = next((tmp_path / "run").glob("checkpoints/step-*"))
    half = folder.with_name("step-0000009")
    shutil.copytree(folder, half)
    (half / "complete.json").unlink()
    moved = config.model_copy(update={"run_dir": tmp_path / "run"})
    assert latest_step(moved.run_dir, alone("cpu")) == SAVED_STEP

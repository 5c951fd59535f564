"""Runs with 8-bit moments and bfloat16 weights: the same on any number of ranks, resumed bit for bit, and converted."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from voxtral_dist.checkpoints.complete import read_complete
from voxtral_dist.checkpoints.files import read_states
from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.model.tiny import build_tiny_voxtral

from corpora import TINY_SHAPE
from ranks import run_ranks
from runs import run_config
from test_checkpoint import train_to

LAST_STEP, SAVED_STEP = 5, 3
# Rows of 256 in the language model and in one matrix of each block of the encoder; rows of 64 in the others.
SHAPE = replace(TINY_SHAPE, text_width=256, text_ffn_width=256)
EIGHT_BIT, BFLOAT16 = {"algorithm": "adamw_8bit"}, {"algorithm": "adamw_8bit", "master_weights": False}
KINDS: dict[str, dict[str, Any]] = {"8-bit": EIGHT_BIT, "8-bit, bfloat16": BFLOAT16}
# Relative difference of losses between numbers of ranks: gradients are summed in another order, in bfloat16 too.
TOLERANCES = {"8-bit": 1e-5, "8-bit, bfloat16": 2e-3}

Losses = list[list[float]]


def train_all(world: World, runs: list[tuple[RunConfig, int]]) -> Losses:
    """Losses of runs, each trained to a step, one after the other."""
    return [train_to(world, config, last_step)[0] for config, last_step in runs]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "wide"
    build_tiny_voxtral(folder, SHAPE)
    return folder


class Runs:
    """Runs on the same model and data, each in a folder of its own."""

    def __init__(self, folder: Path, model: Path, shards: Path) -> None:
        self.folder = folder
        plain = run_config(folder / "run", model, shards, num_steps=LAST_STEP, slots_per_step=3)
        self._tree = plain.model_dump()

    def config(self, name: str, optimizer: dict[str, Any], engine: dict[str, Any] | None = None) -> RunConfig:
        (self.folder / name).mkdir(exist_ok=True)
        changed = {"run_dir": self.folder / name, "optimizer": self._tree["optimizer"] | optimizer}
        return RunConfig.model_validate(self._tree | changed | {"engine": engine or {"fsdp2": {}}})

    def zero_config(self, name: str) -> RunConfig:
        return self.config(name, {}, self._tree["engine"])

    def checkpoint(self, name: str, step: int) -> Path:
        return self.folder / name / "checkpoints" / f"step-{step:07d}"

    def copied(self, source: str, step: int, name: str) -> None:
        """Begin a run from a checkpoint of another."""
        shutil.copytree(self.checkpoint(source, step), self.checkpoint(name, step))

    def tensors(self, name: str, step: int) -> dict[str, Tensor]:
        """The tensors of a checkpoint as they are stored."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        reader = FileSystemReader(self.checkpoint(name, step))
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
        tensors = {key: torch.empty(one.size, dtype=one.properties.dtype) for key, one in stored.items()}
        load(tensors, storage_reader=reader, no_dist=True)
        return tensors


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model: Path, shard_folder: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), model, shard_folder)


@pytest.fixture(scope="module")
def on_two_ranks(runs: Runs) -> dict[str, Losses]:
    """Losses by kind: of a run that never stopped, and of one that stopped half-way, before and after.

    The second half has its states in host memory: on CPU ranks by the same hooks and copies as on GPUs.
    """
    wanted = []
    for kind, optimizer in KINDS.items():
        stopped = runs.config(f"{kind} stopped", optimizer)
        resumed = runs.config(f"{kind} stopped", optimizer, {"fsdp2": {"cpu_offload": True}})
        wanted += [(runs.config(f"{kind} unbroken", optimizer), LAST_STEP), (stopped, SAVED_STEP), (resumed, LAST_STEP)]
    losses = run_ranks(2, train_all, wanted)[0]
    return {kind: losses[3 * number : 3 * number + 3] for number, kind in enumerate(KINDS)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(runs: Runs, on_two_ranks: dict[str, Losses], kind: str) -> None:
    unbroken, before, after = on_two_ranks[kind]
    assert before + after == unbroken
    expected, found = (runs.tensors(f"{kind} {one}", LAST_STEP) for one in ("unbroken", "stopped"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_tensors_are_stored_as_they_are(runs: Runs, on_two_ranks: dict[str, Losses]) -> None:
    weight_types = {"8-bit": torch.float32, "8-bit, bfloat16": torch.bfloat16}
    matrix, embedding = "model.language_model.layers.0.mlp.up_proj.weight", "model.language_model.embed_tokens.weight"
    for kind, weight_type in weight_types.items():
        stored = {
            name: (one.dtype, tuple(one.shape)) for name, one in runs.tensors(f"{kind} stopped", SAVED_STEP).items()
        }
        assert stored[matrix] == (weight_type, (256, 256))
        assert stored[f"{matrix}//exp_avg"] == (torch.int8, (256, 256))
        assert stored[f"{matrix}//exp_avg_sq"] == (torch.uint8, (256, 256))
        assert stored[f"{matrix}//exp_avg.scale"] == stored[f"{matrix}//exp_avg_sq.scale"] == (torch.float32, (256, 1))
        for name in (embedding, "model.audio_tower.layers.0.fc1.weight", "model.language_model.norm.weight"):
            assert stored[f"{name}//exp_avg"][0] == torch.float32
            assert f"{name}//exp_avg.scale" not in stored


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_another_number_of_ranks_gives_the_same_run_and_resumes_the_same_bits(
    runs: Runs, on_two_ranks: dict[str, Losses], num_ranks: int
) -> None:
    wanted = []
    for kind, optimizer in KINDS.items():
        again = f"{kind} again on {num_ranks}"
        runs.copied(f"{kind} stopped", SAVED_STEP, again)
        wanted += [
            (runs.config(again, optimizer), SAVED_STEP),
            (runs.config(f"{kind} on {num_ranks}", optimizer), LAST_STEP),
        ]
    losses = run_ranks(num_ranks, train_all, wanted)[0]
    for number, kind in enumerate(KINDS):
        assert losses[2 * number] == []
        expected, found = runs.tensors(f"{kind} stopped", SAVED_STEP), runs.tensors(f"{kind} again on {num_ranks}", 3)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert losses[2 * number + 1] == pytest.approx(on_two_ranks[kind][0], rel=TOLERANCES[kind])
    # Sums differ by rounding errors, so a few values fall on the other side of a code's edge: a step of a root, which
    # the first moment then relates to.
    expected, found = (runs.tensors(f"8-bit {one}", LAST_STEP) for one in ("unbroken", f"on {num_ranks}"))
    codes = [name for name, one in expected.items() if one.dtype in (torch.int8, torch.uint8)]
    differences = {name: (found[name].int() - expected[name].int()).abs() for name in codes}
    num_differing = sum(int((one > 0).sum()) for one in differences.values())
    assert num_differing < 0.003 * sum(one.numel() for one in differences.values())
    assert all(int(one.max()) <= 2 for name, one in differences.items() if name.endswith("exp_avg_sq"))


def test_moments_are_converted_to_float32_and_back(runs: Runs, on_two_ranks: dict[str, Losses]) -> None:
    """A run with `adamw` takes over the values, and gives them back to one with `adamw_8bit`."""
    runs.copied("8-bit, bfloat16 stopped", SAVED_STEP, "as adamw")
    run_ranks(2, train_all, [(runs.config("as adamw", {}), SAVED_STEP)])
    runs.copied("as adamw", SAVED_STEP, "back")
    run_ranks(1, train_all, [(runs.config("back", BFLOAT16), SAVED_STEP)])
    start, plain, back = (runs.tensors(one, 3) for one in ("8-bit, bfloat16 stopped", "as adamw", "back"))
    assert {one.dtype for one in plain.values()} == {torch.float32}
    folder = runs.checkpoint("8-bit, bfloat16 stopped", SAVED_STEP)
    for state in read_states(folder, read_complete(folder)):
        assert torch.equal(plain[state.name], state.weight)
        for key, moment in state.moments.items():
            assert torch.equal(plain[f"{state.name}//{key}"], moment), state.name
    assert back.keys() == start.keys()
    for name, tensor in start.items():
        if name.endswith("exp_avg.scale"):
            # The quotient of both moments is rounded.
            torch.testing.assert_close(back[name], tensor, rtol=3e-7, atol=0)
        else:
            assert torch.equal(back[name], tensor), name


def test_a_run_goes_on_under_zero_and_comes_back(runs: Runs, on_two_ranks: dict[str, Losses]) -> None:
    unbroken = on_two_ranks["8-bit, bfloat16"][0]
    runs.copied("8-bit, bfloat16 stopped", SAVED_STEP, "zero")
    last = LAST_STEP - 1
    losses = run_ranks(2, train_all, [(runs.zero_config("zero"), last), (runs.config("zero", BFLOAT16), LAST_STEP)])[0]
    assert [*losses[0], *losses[1]] == pytest.approx(unbroken[SAVED_STEP:], rel=1e-2)

"""Saving and exporting copy a tensor to the CPU of the rank that writes it, and to no other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from voxtral_dist.checkpoints.files import hold_states
from voxtral_dist.config import RunConfig
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.distributed.world import World
from voxtral_dist.export import export_trained
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts

from ranks import run_ranks
from runs import run_config
from test_checkpoint import with_engine


class CopiesToCpu(TorchFunctionMode):
    """Counts the bytes of tensors that the package moves to the CPU by name.

    Libraries do so too where they move something to ranks' device, which is the CPU here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is Tensor.cpu or (function is Tensor.to and "cpu" in arguments[1:]):
            is_ours = "/voxtral_dist/" in sys._getframe(1).f_code.co_filename
            self.num_bytes += arguments[0].nbytes if is_ours else 0
        return function(*arguments, **(named or {}))


def copied_bytes(world: World, config: RunConfig) -> dict[str, int]:
    """Bytes that this rank copies to its CPU to save and to export, and bytes of the tensors that it writes."""
    from voxtral_dist.engine.build import build_engine
    from voxtral_dist.train import build_train_step

    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    loader = build_train_loader(config.train_data, prompts, config.seed, 1, world.rank, world.size)
    engine = build_engine(config, LogMel.from_pretrained(config.model.path, world.device), world)
    step = build_train_step(config, engine, world)
    for batches in loader.starting_at(0):
        step.run(batches)
    folder = config.run_dir / "states"
    folder.mkdir(parents=True, exist_ok=True)
    with CopiesToCpu() as to_save:
        assert hold_states(engine, folder, world, None).write().failure is None
    with CopiesToCpu() as to_export:
        export_trained(engine, config, world, step=1)
    written = 0
    for path in folder.glob(f"state-{world.rank:05d}-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            written += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return {"saved": to_save.num_bytes, "written": written, "exported": to_export.num_bytes}


@pytest.fixture(scope="module")
def config(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    # With frozen parameters, which are exported and not saved.
    trainable = {"frozen": ["projector"]}
    folder = tmp_path_factory.mktemp("run")
    return run_config(folder, tiny_model, shard_folder, num_steps=5, trainable=trainable)


@pytest.mark.parametrize("engine", [pytest.param("0", marks=pytest.mark.slow), "2", "3", "fsdp2"])
def test_a_rank_copies_to_its_cpu_what_it_writes_and_nothing_else(
    config: RunConfig, engine: str, tmp_path: Path
) -> None:
    run = with_engine(config, engine, tmp_path / "run")
    of_ranks = run_ranks(2, copied_bytes, run)
    if engine != "fsdp2":
        # FSDP2's ranks write their own partitions by torch's own means.
        assert all(copied["saved"] == copied["written"] > 0 for copied in of_ranks)
    exported = (tmp_path / "run" / "export" / "model.safetensors").stat().st_size
    assert [copied["exported"] for copied in of_ranks] == [pytest.approx(exported, rel=0.02), 0]

"""Seconds for which training stands still for a checkpoint, relative to DeepSpeed's own `save_checkpoint`.

One rank on a CPU, one thread, a random Voxtral of 250 M parameters in float32 with both moments of AdamW: 3.0 GB. In
turns, on the same weights and the same disk:

- `zero`, `zero_background`: this project's checkpoint under ZeRO-2, waited for and in the background;
- `deepspeed`: `save_checkpoint` of the same engine;
- `fsdp2`, `fsdp2_background`: the same under FSDP2;
- `dcp_async`: torch's `async_save` of the same tensors.

All but `dcp_async` and `deepspeed` also compute checksums. In the background, the stall is the copy and the completion;
it ends before the next one begins.

`throughput_lost`: by `NUM_STEPS` updates that begin with a save in the background, relative to as many without, in
turns. `lost_to_another_process`: by as many updates beside a process that writes as many bytes with the same checksums,
which has its own interpreter and stops nobody: what a save costs because processor, memory and disk are shared.

Predicted before the first run: 4 s for whatever writes 3 GB to a drive with 1 GB/s and flushes it, 1 s for the copy at
3 GB/s: a ratio of 4 to 5 on a CPU, whose copies go through the same memory. Over PCIe (25 GB/s) it would be 25.

Not shown here: that a save every 10 steps costs less than 3 % of the throughput. On 2 cores, blocks of ten steps of 3
to 4 s differ among themselves by as much as a save costs.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.model.tiny import TinyShape, build_tiny_voxtral

from workloads.command import run

ROOT = Path(__file__).resolve().parent.parent
SHAPE = TinyShape(
    vocab_size=16_384,
    encoder_width=512,
    text_width=1024,
    text_layers=12,
    text_heads=16,
    text_kv_heads=16,
    text_ffn_width=4096,
)
NUM_ROUNDS, NUM_STEPS, NUM_BLOCKS = 3, 10, 3
SHOWN = (
    "ratio",
    "ratio_to_waiting",
    "ratio_to_dcp_async",
    "throughput_lost",
    "lost_to_another_process",
    "stall_seconds",
)
WRITER = """
import os, sys, xxhash
digest, block = xxhash.xxh3_128(), bytearray(16 << 20)
with open(sys.argv[1], "wb") as file:
    for _ in range(int(sys.argv[2]) // len(block)):
        digest.update(block)
        file.write(block)
    file.flush()
    os.fsync(file.fileno())
"""


def measure(folder: Path, quick: bool) -> dict[str, Any]:
    """Median stalls by contender, and the throughput that saves in the background cost."""
    build_tiny_voxtral(folder / "model", TinyShape() if quick else SHAPE)
    results: dict[str, Any] = {}
    for engine in ("zero", "fsdp2"):
        # Each engine in a process of its own, one after the other: memory of both would not fit.
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=_in_rank, args=(sender, folder, engine, quick))
        process.start()
        sender.close()
        results |= receiver.recv()
        process.join()
    stalls = {name: median(seconds) for name, seconds in results.items() if isinstance(seconds, list)}
    return {
        "stall_seconds": stalls,
        "rounds": {name: seconds for name, seconds in results.items() if isinstance(seconds, list)},
        "ratio": stalls["deepspeed"] / stalls["zero_background"],
        "ratio_to_waiting": {
            "zero": stalls["zero"] / stalls["zero_background"],
            "fsdp2": stalls["fsdp2"] / stalls["fsdp2_background"],
        },
        "ratio_to_dcp_async": stalls["dcp_async"] / stalls["fsdp2_background"],
        "throughput_lost": {name: results[f"{name}_lost"]["saving"] for name in ("zero", "fsdp2")},
        "lost_to_another_process": {name: results[f"{name}_lost"]["writer"] for name in ("zero", "fsdp2")},
        "block_seconds": {name: results[f"{name}_seconds"] for name in ("zero", "fsdp2")},
        "checkpoint_bytes": results["checkpoint_bytes"],
    }


def _in_rank(sender: Any, folder: Path, engine: str, quick: bool) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sender.send(_Contest(folder, engine, quick).results())


class _Contest:
    """One engine, and the ways to save it."""

    def __init__(self, folder: Path, kind: str, quick: bool) -> None:
        from voxtral_dist.checkpoints.directory import CheckpointDirectory
        from voxtral_dist.data.examples.micro_batch import collate, silent_example
        from voxtral_dist.engine.build import build_engine
        from voxtral_dist.model.features import LogMel
        from voxtral_dist.model.prompts import VoxtralPrompts

        world = World(0, 1, 0, torch.device("cpu"))
        config = _config(folder, kind)
        config.run_dir.mkdir(parents=True)
        self._kind = kind
        self._quick = quick
        prompts = VoxtralPrompts.from_pretrained(config.model.path)
        self._batch = collate([silent_example(prompts)], prompts)
        self._engine = build_engine(config, LogMel.from_pretrained(config.model.path, world.device), world)
        self._directory = CheckpointDirectory(config, "", world)
        self._folder = config.run_dir
        self._step()

    def results(self) -> dict[str, Any]:
        contenders = {self._kind: self._waited, f"{self._kind}_background": self._in_background}
        contenders |= {"deepspeed": self._deepspeed} if self._kind == "zero" else {"dcp_async": self._dcp_async}
        stalls: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(1 if self._quick else NUM_ROUNDS):
            for name, save in contenders.items():
                stalls[name].append(save(number + 1))
        newest = max((self._folder / "checkpoints").iterdir())
        num_bytes = sum(path.stat().st_size for path in newest.iterdir())
        blocks = self._blocks(num_bytes)
        typical = {kind: median(seconds) for kind, seconds in blocks.items()}
        lost = {kind: seconds / typical["alone"] - 1 for kind, seconds in typical.items()}
        return stalls | {"checkpoint_bytes": num_bytes, f"{self._kind}_lost": lost, f"{self._kind}_seconds": blocks}

    def _waited(self, number: int) -> float:
        from voxtral_dist.checkpoints.progress import TrainProgress

        return _seconds(lambda: self._directory.save(self._engine, TrainProgress(step=2 * number)))

    def _in_background(self, number: int) -> float:
        from voxtral_dist.checkpoints.progress import TrainProgress

        progress = TrainProgress(step=2 * number + 1)
        stall = _seconds(lambda: self._directory.start(self._engine, progress, in_background=True))
        while not self._directory.is_written:
            time.sleep(0.01)
        return stall + _seconds(self._directory.finish)

    def _deepspeed(self, number: int) -> float:
        seconds = _seconds(lambda: self._engine._engine.save_checkpoint(str(self._folder / "deepspeed")))
        # As this project's, it is on the disk when it is complete.
        seconds += _seconds(os.sync)
        shutil.rmtree(self._folder / "deepspeed")
        return seconds

    def _dcp_async(self, number: int) -> float:
        from torch.distributed.checkpoint.state_dict_saver import async_save

        started: list[Any] = []
        folder = self._folder / "dcp"
        seconds = _seconds(lambda: started.append(async_save(self._engine.partitions(), checkpoint_id=folder)))
        started[0].result()
        shutil.rmtree(folder)
        return seconds

    def _blocks(self, num_bytes: int) -> dict[str, list[float]]:
        """Seconds of `NUM_STEPS` steps alone, with a save in the background, and beside another process that writes."""
        blocks: dict[str, Callable[[int], None]] = {"alone": lambda _: self._steps(), "saving": self._steps_saving}
        blocks["writer"] = lambda _: self._steps_beside_writer(num_bytes)
        seconds: dict[str, list[float]] = {kind: [] for kind in blocks}
        for number in range(1 if self._quick else NUM_BLOCKS):
            for kind, block in blocks.items():
                seconds[kind].append(_seconds(lambda block=block, number=number: block(number)))
        return seconds

    def _steps(self) -> None:
        for _ in range(NUM_STEPS):
            self._step()

    def _steps_saving(self, number: int) -> None:
        from voxtral_dist.checkpoints.progress import TrainProgress

        self._directory.start(self._engine, TrainProgress(step=100 + number), in_background=True)
        for _ in range(NUM_STEPS):
            self._step()
            if self._directory.is_written:
                self._directory.finish()
        if self._directory.is_under_way:
            self._directory.finish()

    def _steps_beside_writer(self, num_bytes: int) -> None:
        writer = subprocess.Popen([sys.executable, "-c", WRITER, self._folder / "other", str(num_bytes)])
        self._steps()
        assert writer.wait() == 0
        (self._folder / "other").unlink()

    def _step(self) -> None:
        self._engine.backward(self._batch, 1, is_last=True)
        self._engine.step(1e-6)


def _seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _config(folder: Path, kind: str) -> RunConfig:
    engine = {"fsdp2": {}} if kind == "fsdp2" else {"deepspeed": ROOT / "ds_configs" / "zero2.json"}
    return RunConfig.model_validate(
        {
            "run_dir": folder / kind,
            "num_steps": 1,
            "model": {"path": str(folder / "model"), "precision": "float32"},
            "train_data": {"shards": ["none"], "max_examples": 1},
            "optimizer": {"learning_rate": 1e-6, "warmup_steps": 0},
            "engine": engine,
            "checkpoint": {"keep": 1},
        }
    )


if __name__ == "__main__":
    run(__doc__, measure, SHOWN)

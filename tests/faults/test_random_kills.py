"""A long run that SIGKILL ends at a hundred random moments: whatever it recorded is that of the unbroken run."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch.utils import cpp_extension

from voxtral_dist.checkpoints.complete import COMPLETE, read_complete
from voxtral_dist.config import RunConfig

from fault_table import ENGINES
from injection import faulty_program
from ranks import EndedJob, Kill, run_job
from runs import free_port, rows, run_config, write_config

NUM_KILLS, NUM_KILLS_AT_THE_END = 100, 15
NUM_STEPS = 160
SAVE_EVERY, EVALUATE_EVERY = 2, 6
LIMIT_SECONDS = 240
# From SIGTERM, which the other rank gets when one was killed, to its SIGKILL.
MAX_GRACE_SECONDS = 2.0
WITH_WORKER = 0.2
SEED = 21

# How often a kill comes in a phase, and how many of these phases a process may have seen then. Threads go on with a
# save while the next steps are made. The export comes last.
TARGETS = {"start": (2, 1), "step": (4, 3), "save": (4, 2), "evaluation": (2, 1)}
NAMES = {"data": "step", "end": "export"}


def observed_program(rank: int, arguments: list[str], port: int, noted: Path) -> None:
    """`faulty_program` without a fault, which notes the time of each phase that it comes to."""
    from voxtral_dist.distributed.standing import Standing

    stand, folder, counts = Standing.stand, noted / str(rank), Counter[str]()
    folder.mkdir()

    def note(phase: str) -> None:
        counts[phase] += 1
        (folder / f"{phase}-{counts[phase]}").write_text(str(time.time()))

    def noting(self: Standing, phase: Any, *where: Any) -> None:
        if phase != self.place.phase:
            note(phase)
        stand(self, phase, *where)

    Standing.stand = noting  # type: ignore[method-assign]
    note("start")
    faulty_program(rank, arguments, port, None)


def phases(folder: Path) -> list[tuple[float, str]]:
    """When a rank has come to each phase; a kill may come between the making of a note and its time."""
    return sorted((float(path.read_text() or "inf"), path.name.partition("-")[0]) for path in folder.glob("*-*"))


@dataclass(frozen=True)
class Unbroken:
    """A run that nothing happens to.

    durations: in seconds, of each time that rank 0 was in a phase.
    """

    config: RunConfig
    durations: dict[str, list[float]]


def run(config: RunConfig, noted: Path, kill: Kill | None = None, grace_seconds: float = 30.0) -> EndedJob:
    """Run on two ranks, to the end or until it is killed."""
    noted.mkdir()
    ended = run_job(
        2,
        observed_program,
        ["train", f"--config={write_config(config)}"],
        free_port(),
        noted,
        limit_seconds=LIMIT_SECONDS,
        grace_seconds=grace_seconds,
        kill=kill,
    )
    assert ended.code == 0 or (kill is not None and ended.code == 247), ended.output
    return ended


@pytest.fixture
def own_extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of DeepSpeed's extension for CPUs that no other program of this machine uses.

    Other programs would wait for the lock of a process that was killed while it loaded the extension.
    """
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    for compiled in cache.glob("**/deepspeed_shm_comm"):
        shutil.copytree(compiled, tmp_path / "extensions" / compiled.name, ignore=shutil.ignore_patterns("lock"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))


@pytest.fixture
def unbroken(engine: str, own_extensions: None, tiny_model: Path, shard_folder: Path, tmp_path: Path) -> Unbroken:
    config = run_config(
        tmp_path / "unbroken",
        tiny_model,
        shard_folder,
        num_steps=NUM_STEPS,
        slots_per_step=2,
        stage=3 if engine == "fsdp2" else int(engine),
        checkpoint={"every_steps": SAVE_EVERY, "asynchronous": True},
        evaluation={
            "test_sets": {"same": {"shards": str(shard_folder), "max_utterances": 4}},
            "every_steps": EVALUATE_EVERY,
            "at_start": False,
        },
        export={"layouts": ["hf"]},
        metrics={"tensorboard": False},
        **({"engine": {"fsdp2": {}}} if engine == "fsdp2" else {}),
    )
    end = run(config, tmp_path / "noted").last_end
    assert list(measured(config, "train")) == list(range(1, NUM_STEPS + 1))
    durations: dict[str, list[float]] = {}
    for (began, phase), (ended, _) in pairwise([*phases(tmp_path / "noted" / "0"), (end, "")]):
        durations.setdefault(phase, []).append(ended - began)
    # With the part in the background.
    durations["save"] = [row["seconds"] for row in rows(config.run_dir, "checkpoint")]
    return Unbroken(config, durations)


def measured(config: RunConfig, kind: str) -> dict[int, dict[str, Any]]:
    """The rows of a kind by step, without times and memory; each step has one."""
    found = rows(config.run_dir, kind)
    by_step = {row["step"]: {key: value for key, value in row.items() if not is_of_this_process(key)} for row in found}
    assert len(by_step) == len(found)
    return by_step


def is_of_this_process(key: str) -> bool:
    """Whether a measurement depends on the machine, and not on the run alone."""
    return key in ("memory_gigabytes", "rtfx") or (key.endswith(("seconds", "per_second")) and key != "audio_seconds")


@dataclass(frozen=True)
class Killed:
    """A process of the run that was killed.

    phase: of the rank that was killed. num_lost: steps that were done, and are done again. is_writing: whether it left
    a checkpoint half written. hits_both: whether both ranks were killed.
    """

    phase: str
    num_lost: int
    is_writing: bool
    hits_both: bool


def random_kill(chance: random.Random, durations: dict[str, list[float]], noted: Path, *, at_the_end: bool) -> Kill:
    """A moment in one of the phases that a process has not yet seen."""
    weights = [weight for weight, _ in TARGETS.values()]
    phase = "end" if at_the_end else chance.choices(list(TARGETS), weights)[0]
    number = 1 if at_the_end else chance.randint(1, TARGETS[phase][1])
    rank = chance.choice([None, 0, 1])
    seconds = chance.uniform(0, chance.choice(durations[phase]))
    return Kill(seconds, rank, after=noted / str(rank or 0) / f"{phase}-{number}")


def kill_often(config: RunConfig, unbroken: Unbroken, tmp_path: Path) -> list[Killed]:
    """Start a run again and again until it was killed as often as it should be; what each kill hit."""
    chance, killed = random.Random(SEED), list[Killed]()
    expected = measured(unbroken.config, "train")
    for number in range(2 * NUM_KILLS):
        noted, workers = tmp_path / f"noted-{number}", int(chance.random() < WITH_WORKER)
        # Also where the last step came early.
        at_the_end = len(killed) >= NUM_KILLS - NUM_KILLS_AT_THE_END or newest_step(config) == NUM_STEPS
        kill = random_kill(chance, unbroken.durations, noted, at_the_end=at_the_end)
        train_data = config.train_data.model_copy(update={"num_workers": workers})
        grace_seconds, left = chance.uniform(0, MAX_GRACE_SECONDS), incomplete(config)
        ended = run(config.model_copy(update={"train_data": train_data}), noted, kill, grace_seconds)
        found = measured(config, "train")
        assert found == {step: expected[step] for step in range(1, len(found) + 1)}, kill
        if ended.code:
            phase = phases(noted / str(kill.rank or 0))[-1][1]
            # A process that had not begun to train has lost nothing more than the one before it.
            num_lost = 0 if phase == "start" else len(found) - newest_step(config)
            killed.append(Killed(phase, num_lost, bool(incomplete(config) - left), kill.rank is None))
            print(f"{len(killed)}: {killed[-1]}, {kill}", flush=True)
        if len(killed) == NUM_KILLS:
            break
    return killed


def incomplete(config: RunConfig) -> set[int]:
    """When each file was written of checkpoints that were begun and not completed."""
    return {path.stat().st_mtime_ns for path in config.run_dir.glob("checkpoints/.step-*.tmp/*")}


def newest_step(config: RunConfig) -> int:
    """The step from which a run goes on."""
    return max((int(path.parent.name[5:]) for path in config.run_dir.glob(f"checkpoints/step-*/{COMPLETE}")), default=0)


def contents(config: RunConfig) -> dict[str, Any]:
    """What a run has stored: hypotheses and exported weights, and checksums of weights and moments."""
    files = ("evaluations/*/same.jsonl", "export/*.safetensors")
    stored = read_complete(config.run_dir / "checkpoints" / f"step-{NUM_STEPS:07d}").files
    tensors = {name: file for name, file in stored.items() if Path(name).suffix in (".safetensors", ".distcp")}
    assert tensors
    return tensors | {
        str(path.relative_to(config.run_dir)): path.read_bytes()
        for pattern in files
        for path in config.run_dir.glob(pattern)
    }


def summary(killed: Sequence[Killed], engine: str) -> str:
    """What was done, for people."""
    where = Counter(NAMES.get(one.phase, one.phase) for one in killed)
    lost = [one.num_lost for one in killed]
    return (
        f"{ENGINES[engine]}: {len(killed)} kills of a run of {NUM_STEPS} steps, "
        f"{sum(one.hits_both for one in killed)} of them of both ranks; "
        f"{', '.join(f'{number} in {name}' for name, number in where.most_common())}; "
        f"{sum(one.is_writing for one in killed)} left a checkpoint half written; "
        f"{sum(lost) / len(lost):.1f} steps lost on average, at most {max(lost)}"
    )


@pytest.mark.parametrize(
    "engine", [pytest.param("2", marks=pytest.mark.faults), pytest.param("fsdp2", marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_a_hundred_times_is_the_unbroken_one(
    engine: str, unbroken: Unbroken, tmp_path: Path
) -> None:
    config = unbroken.config.model_copy(update={"run_dir": tmp_path / "killed"})
    killed = kill_often(config, unbroken, tmp_path)
    assert len(killed) == NUM_KILLS
    # One interval, and one during which a checkpoint is written.
    assert max(one.num_lost for one in killed) <= 2 * SAVE_EVERY
    run(config, tmp_path / "noted-last")
    assert measured(config, "train") == measured(unbroken.config, "train")
    assert measured(config, "evaluation") == measured(unbroken.config, "evaluation")
    assert list(measured(config, "evaluation")) == [*range(EVALUATE_EVERY, NUM_STEPS, EVALUATE_EVERY), NUM_STEPS]
    assert contents(config) == contents(unbroken.config)
    print(summary(killed, engine))

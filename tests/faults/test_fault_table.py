"""The table of faults: each fault in each phase of a run under each engine, and the same command again.

A run meets a fault of one kind in each of its phases, one after the other, and is started again after each.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import boto3
import pytest

from voxtral_dist.checkpoints.complete import COMPLETE
from voxtral_dist.config import RunConfig
from voxtral_dist.training.metrics_file import read_metrics

from fault_table import DAMAGED, DAMAGES, ENGINES, IMPOSSIBLE, PHASES, STARTING, Row, locked, store_row
from injection import FAULTS, Injection, faulty_program, undo
from ranks import EndedJob, run_job
from runs import ROOT, free_port, run_config, write_config
from servers import Gate, file_server, gate_before

pytestmark = pytest.mark.faults

ROWS = ROOT / "build" / "faults.json"
NUM_STEPS = 10
SAVE_EVERY = 2
NUM_TESTED = 4
# On a busy machine; a fault that nobody notices costs it.
LIMIT_SECONDS = 240
# Launchers wait for 30 s. A rank is silent for 5 s before another one says so.
GRACE_SECONDS = 8
STALL_SECONDS = 3.0


@dataclass(frozen=True)
class Expected:
    """What a fault may do.

    Attributes:
        usual, unusual: exit codes, and those of some phases.
        said: what the first line says.
        lost: at most so many steps.
        needs_root: whether it mounts a disk.
        settings: of section `distributed`.
        num_workers: data workers of a rank.
    """

    usual: int | tuple[int, ...]
    said: str = ""
    lost: int = 2 * SAVE_EVERY
    phases: tuple[str, ...] = PHASES
    needs_root: bool = False
    settings: dict[str, float] = field(default_factory=dict)
    num_workers: int = 0
    unusual: dict[str, int | tuple[int, ...]] = field(default_factory=dict)

    def codes(self, phase: str) -> tuple[int, ...]:
        """The exit codes that are right in a phase."""
        code = self.unusual.get(phase, self.usual)
        return code if isinstance(code, tuple) else (code,)


# An evaluation ends before its next batch, if there is one; an export goes on to the end.
_AT_THE_END: dict[str, int | tuple[int, ...]] = {"evaluating": (75, 0), "exporting": 0}
_STOPS = Expected(75, "Stopped at step|Done", lost=0, unusual=_AT_THE_END)
# Steps and saves of these runs take less than a second.
_HANGS = Expected(77, "No rank has made progress", settings={"timeout_seconds": 60.0, "watchdog_seconds": 1.5})
# An evaluation ends on all ranks with the error of one, unless they decode in lockstep.
_RAISES = Expected(1, "InjectedError", unusual={"evaluating": (3, 1)})
# Where the main thread reads utterances, an exception that comes from elsewhere may be taken for one of them.
_RAISES_ANYWHERE = replace(_RAISES, num_workers=1)
EXPECTED = {
    "exception": _RAISES,
    "exception from another thread": _RAISES_ANYWHERE,
    "exception in a signal handler": _RAISES_ANYWHERE,
    "abort": Expected(250),
    "segmentation fault": Expected(245),
    "SIGINT": _STOPS,
    "SIGKILL": Expected(247),
    "SIGTERM": replace(_STOPS, said=f"Stopped by a signal before training|{_STOPS.said}", phases=(STARTING, *PHASES)),
    "two SIGTERMs": _STOPS,
    "SIGSTOP": _HANGS,
    "a rank sleeps": _HANGS,
    "the interpreter's lock is held": _HANGS,
    # A rank that gives no sign of life for 0.9 of it is lost.
    "host lost": Expected(76, "gone", settings={"timeout_seconds": 12.0}),
    "disk full": Expected(74, "cannot be written", needs_root=True),
    "read-only disk": Expected(74, "cannot be written|cannot write", needs_root=True),
    "`run_dir` removed": Expected(74, "cannot be written", lost=NUM_STEPS),
}
STALLS = "object store stalls"
assert {*EXPECTED, STALLS} == set(FAULTS), "each fault has its place in the table"


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "train"}


def resumed_step(run_dir: Path) -> int:
    """The step from which the newest process of a run went on."""
    events = [row for row in read_metrics(run_dir / "metrics.jsonl") if row.get("event") in ("started", "resumed")]
    return events[-1]["step"] if events else 0


def first_line(output: str, run_dir: Path) -> str:
    """The first line that tells the user what happened, without names of this machine."""
    output = output.replace(str(run_dir), "RUN_DIR").replace(socket.gethostname(), "HOST")
    # Times of day would differ between two outputs of the table.
    lines = re.sub(r"\b\d\d:\d\d:\d\d\b|\d{8}-\d{6}", "TIME", output).splitlines()
    for pattern in (r"voxtral-dist: error: ", r"Stopped ", r"Done: ", r"[\w.]*(Error|Exception|Interrupt)\b"):
        for line in lines:
            if re.match(pattern, line):
                return line.removeprefix("voxtral-dist: error: ")
    return ""


@dataclass(frozen=True)
class Reference:
    """A run that nothing happened to."""

    config: RunConfig
    losses: dict[int, float]

    def configured(self, run_dir: Path, **sections: object) -> RunConfig:
        tree = self.config.model_dump(mode="json") | {"run_dir": str(run_dir)}
        for name, values in sections.items():
            tree[name] = tree[name] | values if isinstance(values, dict) else values
        return RunConfig.model_validate(tree)

    def agrees(self, run_dir: Path) -> bool:
        """Whether each step of a run has the same loss, to the last bit."""
        found = losses(run_dir)
        return all(self.losses[step] == loss for step, loss in found.items())

    def is_equal(self, run_dir: Path) -> bool:
        """Whether a finished run has the same losses, hypotheses and exported weights."""
        same = [Path("export", "model.safetensors"), Path("evaluations", f"step-{NUM_STEPS:07d}", "same.jsonl")]
        return losses(run_dir) == self.losses and all(
            (run_dir / path).read_bytes() == (self.config.run_dir / path).read_bytes() for path in same
        )


def run(config: RunConfig, injection: Injection | None = None, lost_rank: int | None = None) -> EndedJob:
    """Start the command of a run on two ranks, and wait for its end."""
    arguments = ["train", f"--config={write_config(config)}"]
    return run_job(
        2,
        faulty_program,
        arguments,
        free_port(),
        injection,
        limit_seconds=LIMIT_SECONDS,
        grace_seconds=GRACE_SECONDS,
        lost_rank=lost_rank,
    )


@pytest.fixture(scope="session", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def unbroken(engine: str, tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """One run for all processes of the tests."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    stored = folder / f"unbroken-{engine}.json"
    with locked(stored):
        if not stored.exists():
            config = unbroken_config(engine, folder / f"unbroken-{engine}", tiny_model, shard_folder)
            ended = run(config)
            assert ended.code == 0, ended.output
            assert list(losses(config.run_dir)) == list(range(1, NUM_STEPS + 1))
            stored.write_text(config.model_dump_json())
    config = RunConfig.model_validate_json(stored.read_text())
    return Reference(config, losses(config.run_dir))


def unbroken_config(engine: str, run_dir: Path, model: Path, shards: Path) -> RunConfig:
    return run_config(
        run_dir,
        model,
        shards,
        num_steps=NUM_STEPS,
        slots_per_step=2,
        stage=3 if engine == "fsdp2" else int(engine),
        checkpoint={"every_steps": SAVE_EVERY, "keep": 3, "asynchronous": True},
        evaluation={
            "test_sets": {"same": {"shards": str(shards), "max_utterances": NUM_TESTED}},
            "at_start": False,
            # One engine without a copy of the weights: ranks decode in lockstep.
            "weights": "sharded" if engine == "3" else "gathered",
        },
        export={"layouts": ["hf"]},
        metrics={"tensorboard": False},
        **({"engine": {"fsdp2": {}}} if engine == "fsdp2" else {}),
    )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """Mounts a small disk, and returns the folder of it."""
    mounted: list[Path] = []

    def mount() -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(folder)], check=True)
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-R", "-l", str(folder)], check=True)


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_run_is_the_unbroken_one_after_a_fault_in_any_phase(
    fault: str, engine: str, unbroken: Reference, tmp_path: Path, disk: Callable[[], Path]
) -> None:
    expected = EXPECTED[fault]
    if expected.needs_root and os.geteuid() != 0:
        pytest.skip("only root mounts disks")
    folder = disk() if fault == "disk full" else tmp_path
    config = unbroken.configured(
        folder / "run", distributed=expected.settings, train_data={"num_workers": expected.num_workers}
    )
    pending: list[Fault] = []
    wrong = []
    for phase in (*expected.phases, None):
        injection = phase and Injection(fault, phase, config.run_dir, tmp_path / f"came-{phase}")
        ended = run(config, injection, lost_rank=1 if injection and fault == "host lost" else None)
        if losses(config.run_dir):
            # How the run went on after the faults before.
            start, is_equal = resumed_step(config.run_dir), unbroken.agrees(config.run_dir)
            wrong += [text for one in pending for text in one.judge(fault, engine, start, is_equal)]
            pending = []
        if injection is None:
            assert ended.code == 0, ended.output
            assert unbroken.is_equal(config.run_dir), ended.output
            break
        came, step = injection.came()
        undo(injection)
        said = first_line(ended.output, config.run_dir)
        pending.append(Fault(phase, ended, said, came, max([step, *losses(config.run_dir)])))
    assert not wrong, "\n".join(wrong)


@dataclass(frozen=True)
class Fault:
    """The end of a run in a phase, by a fault that came after a step."""

    phase: str
    ended: EndedJob
    said: str
    came: float
    last_step: int

    def judge(self, fault: str, engine: str, resumed_step: int, is_equal: bool) -> list[str]:
        """Record it; what of it is not as it should be."""
        expected, ended, said = EXPECTED[fault], self.ended, self.said
        lost = max(0, self.last_step - resumed_step)
        row = Row(
            detected=ended.first_end - self.came if ended.code else None,
            ended=ended.last_end - self.came if ended.code else None,
            steps_lost=lost,
            is_equal=is_equal,
            said=said,
            code=-1 if ended.code is None else ended.code,
        )
        store_row(ROWS, fault, self.phase, engine, row)
        wrong = []
        if ended.code not in expected.codes(self.phase):
            wrong.append(f"code {ended.code}, not {expected.codes(self.phase)}:\n{ended.output[-2000:]}")
        elif re.search(expected.said, said) is None:
            wrong.append(f"it says {said!r}:\n{ended.output[-2000:]}")
        if lost > expected.lost:
            wrong.append(f"{lost} steps lost")
        if not is_equal:
            wrong.append("other losses")
        return [f"{fault}, {self.phase}, {ENGINES[engine]}: {text}" for text in wrong]


@pytest.mark.parametrize("phase", [phase for phase in PHASES if (STALLS, phase) not in IMPOSSIBLE])
def test_object_stores_that_stall_only_delay_a_run(
    phase: str,
    engine: str,
    unbroken: Reference,
    tmp_path: Path,
    s3_environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = f"{engine}-{phase}"
    with (
        file_server() as server,
        gate_before(server.url) as data,
        gate_before(s3_environment["AWS_ENDPOINT_URL"]) as s3,
    ):
        for path in Path(unbroken.config.train_data.shards[0]).iterdir():
            server.files[f"speech/{path.name}"] = path.read_bytes()
        for variable, value in (s3_environment | {"AWS_ENDPOINT_URL": s3.url}).items():
            monkeypatch.setenv(variable, value)
        url = f"{data.url}/speech"
        config = unbroken.configured(
            tmp_path / "run",
            train_data={"shards": [url]},
            evaluation={"test_sets": {"same": {"shards": url, "max_utterances": NUM_TESTED}}},
            # Pieces so small that each utterance is fetched when it is needed.
            storage={"cache_dir": str(tmp_path / "cache"), "cache_chunk_megabytes": 0.002, "timeout_seconds": 1.0},
            checkpoint={"upload": f"s3://corpus/{name}"},
        )
        injection = Injection(STALLS, phase, config.run_dir, tmp_path / "came")
        with closing(s3 if phase == "saving" else data, injection.marker):
            ended = run(config, injection)
    is_equal = unbroken.is_equal(config.run_dir)
    said = first_line(ended.output, config.run_dir)
    store_row(ROWS, STALLS, phase, engine, Row(None, None, 0, is_equal, said, -1 if ended.code is None else ended.code))
    assert ended.code == 0, ended.output
    assert is_equal
    assert data.num_held + s3.num_held > 0, "nothing had to wait"
    uploaded = boto3.client("s3", endpoint_url=s3_environment["AWS_ENDPOINT_URL"]).list_objects_v2(
        Bucket="corpus", Prefix=f"{name}/step-{NUM_STEPS:07d}/{COMPLETE}"
    )
    assert uploaded["KeyCount"] == 1, ended.output


@contextmanager
def closing(gate: Gate, marker: Path) -> Iterator[None]:
    """Close a gate when a file has appeared, until something has had to wait for some seconds."""
    done = threading.Event()

    def close() -> None:
        while not marker.exists():
            if done.wait(0.01):
                return
        gate.close()
        while not gate.num_held and not done.wait(0.01):
            pass
        done.wait(STALL_SECONDS)
        gate.open()

    thread = threading.Thread(target=close)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path, position: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)


def largest(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


def header(folder: Path) -> Path:
    return folder / ".metadata" if (folder / ".metadata").exists() else largest(folder)


_DAMAGES: dict[str, Callable[[Path], None]] = {
    "size": lambda folder: truncate(largest(folder)),
    "content": lambda folder: flip(largest(folder), 0.7),
    "header": lambda folder: flip(header(folder), 0.001),
    "manifest": lambda folder: flip(folder / COMPLETE, 0.5),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
    damage: str, engine: str, unbroken: Reference, tmp_path: Path
) -> None:
    config = unbroken.configured(tmp_path / "run")
    shutil.copytree(unbroken.config.run_dir, config.run_dir)
    shutil.rmtree(config.run_dir / "export")
    newest = max((config.run_dir / "checkpoints").iterdir())
    _DAMAGES[damage](newest)
    ended = run(config)
    said = [line for line in ended.output.replace(str(config.run_dir), "RUN_DIR").splitlines() if "is damaged" in line]
    start, is_equal = resumed_step(config.run_dir), unbroken.is_equal(config.run_dir)
    row = Row(None, None, NUM_STEPS - start, is_equal, "".join(said[:1]), ended.code or 0)
    store_row(ROWS, f"{DAMAGED}{damage}", STARTING, engine, row)
    assert ended.code == 0, ended.output
    assert start == NUM_STEPS - SAVE_EVERY
    assert is_equal
    assert f"It is now called damaged-{newest.name}, and is not used." in row.said

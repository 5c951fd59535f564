"""A small run on the three hosts, as users start it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import held_train
from network import ALL, NUM_HOSTS, Network, Program, wait_for_end

from voxtral_dist.training.metrics_file import read_metrics

from runs import ROOT, run_config, write_config
from test_entrypoint import ENTRYPOINT, environment, wait_for

NUM_STEPS = 8
# Of collectives and of the start.
LIMIT_SECONDS = 12
# By which others may outlive a host, besides the limit.
GRACE_SECONDS = 10
# How long anything may take that nothing is wrong with.
PATIENCE_SECONDS = 600
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3},
    "FSDP2": {"engine": {"fsdp2": {}}},
}
HANG, LOST, STOPPED, MISTAKE = 77, 76, 75, 2
_PORT = "29500"
# Of any run, relative to `run_dir`.
_RESULTS = [
    *(Path("evaluations", f"step-{step:07d}", "dev.jsonl") for step in (NUM_STEPS // 2, NUM_STEPS)),
    Path("export", "model.safetensors"),
]
_BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Reference:
    """What an unbroken run on one host has computed: the loss of each step, and the contents of files of results."""

    losses: dict[int, float]
    results: dict[Path, bytes]


class TrainingRun:
    """A run in `folder`, with a checkpoint every second step and two evaluations."""

    def __init__(
        self, network: Network, folder: Path, model: Path, shards: Path, engine: str = "ZeRO-3", **sections: Any
    ) -> None:
        self._network = network
        self._folder = folder
        defaults: dict[str, Any] = {
            "num_steps": NUM_STEPS,
            "slots_per_step": 3,
            "checkpoint": {"every_steps": 2, "keep": 3, "asynchronous": True},
            "evaluation": {
                "test_sets": {"dev": {"shards": str(shards), "max_utterances": 6}},
                "every_steps": NUM_STEPS // 2,
                "at_start": False,
                "max_tokens_per_second": 1.0,
            },
            "metrics": {"tensorboard": False},
            "distributed": {"timeout_seconds": LIMIT_SECONDS, "start_timeout_seconds": LIMIT_SECONDS},
        }
        self.config = run_config(folder / "run", model, shards, **defaults | ENGINES[engine] | sections)
        self.file = write_config(self.config)
        self._num_started = 0
        self._held: Path | None = None
        self._variables_of_host: dict[int, dict[str, str]] = {}

    def hold(self, host: int, phase: str) -> None:
        """Let ranks that are started next on a host wait in a phase, until `release`."""
        self._held = self._folder / "held"
        self._variables_of_host = {host: held_train.variables_of_hold(phase, self._held)}

    def wait_until_held(self) -> None:
        """Wait until the rank is in its phase."""
        assert self._held is not None
        wait_for(self._held.exists, PATIENCE_SECONDS)

    def release(self) -> None:
        """Let the rank go on."""
        assert self._held is not None
        self._held.unlink()
        self._variables_of_host = {}

    def start(
        self,
        hosts: Sequence[int] = ALL,
        more: Mapping[int, Sequence[str]] | None = None,
        variables: Mapping[int, Mapping[str, str]] | None = None,
        folder: Callable[[int], Path] | None = None,
    ) -> list[Program]:
        """Start a rank on each of some hosts, forked, because imports would take much longer than the run.

        Args:
            hosts: their numbers.
            more: further arguments of a host.
            variables: further ones of a host.
            folder: the working folder of a host.
        """
        self._num_started += 1
        programs = []
        for host in hosts:
            place = {"RANK": str(host), "WORLD_SIZE": str(NUM_HOSTS), "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
            of_host = (variables or {}).get(host, {})
            arguments = ["--config", str(self.file), *(more or {}).get(host, ())]
            programs.append(
                self._fork(host, host, place | of_host, arguments, folder(host) if folder else self._folder)
            )
        return programs

    def start_on_one(self) -> list[Program]:
        """Start three ranks on host 0."""
        self._num_started += 1
        size = str(NUM_HOSTS)
        places = [{"RANK": str(rank), "WORLD_SIZE": size, "LOCAL_RANK": str(rank), "LOCAL_SIZE": size} for rank in ALL]
        arguments = ["--config", str(self.file)]
        return [self._fork(0, rank, place, arguments, self._folder) for rank, place in enumerate(places)]

    def _fork(
        self, host: int, rank: int, variables: Mapping[str, str], arguments: list[str], working_folder: Path
    ) -> Program:
        meeting = {"MASTER_ADDR": self._network.names[0], "MASTER_PORT": _PORT}
        own = meeting | dict(variables) | self._variables_of_host.get(host, {})
        log = self._folder / f"log-{self._num_started}-{rank}"
        return self._network.fork(host, held_train.train, own, arguments, working_folder, folder=log)

    def launch(self, variables: Mapping[str, str] | None = None) -> list[Program]:
        """Start the entrypoint on each host."""
        return self._launch(lambda _host: [ENTRYPOINT], variables or {"NUM_NODES": str(NUM_HOSTS)})

    def launch_by_deepspeed(self) -> list[Program]:
        """Start the command `deepspeed` on each host."""
        hostfile = self._folder / "hostfile"
        return self._launch(lambda host: [*deepspeed(self._network, host, hostfile), held_train.__file__], {})

    def _launch(self, command: Callable[[int], Sequence[str | Path]], variables: Mapping[str, str]) -> list[Program]:
        self._num_started += 1
        paths = [ROOT, ROOT / "tests", ROOT / "tests" / "faults"]
        common = {"PYTHONPATH": ":".join(map(str, paths)), "MASTER_ADDR": self._network.names[0], **variables}
        programs = []
        for host in ALL:
            own = common | {"NODE_RANK": str(host)} | self._variables_of_host.get(host, {})
            log = self._folder / f"log-{self._num_started}-{host}"
            words = [*command(host), "--config", self.file]
            of_host = environment(Path(held_train.__file__), **own)
            programs.append(self._network.launch(host, words, of_host, self._folder, log))
        return programs

    def losses(self) -> dict[int, float]:
        """The loss of each step so far."""
        return {row["step"]: row["loss"] for row in self.rows() if row["kind"] == "train"}

    def rows(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl` so far."""
        return read_metrics(self.config.run_dir / "metrics.jsonl")

    def as_reference(self) -> Reference:
        """Run on one host to the end."""
        finished(self.start_on_one())
        assert sorted(self.losses()) == list(range(1, NUM_STEPS + 1))
        return Reference(self.losses(), self._results())

    def finish_and_compare(self, reference: Reference) -> None:
        """Start it again on all hosts, to the end: nothing may be lost, and nothing may differ."""
        finished(self.start())
        self.compare(reference)

    def compare(self, reference: Reference) -> None:
        """Losses, hypotheses and exported weights are those of the unbroken run on one host, to the last bit."""
        assert self.losses() == reference.losses
        assert self._results() == reference.results

    def _results(self) -> dict[Path, bytes]:
        return {path: (self.config.run_dir / path).read_bytes() for path in _RESULTS}


def deepspeed(network: Network, host: int, hostfile: Path) -> list[str | Path]:
    """The command `deepspeed` on a host, without ssh."""
    hostfile.write_text("".join(f"{name} slots=1\n" for name in network.names))
    options = ["--hostfile", hostfile, "--no_ssh", "--node_rank", str(host), "--master_addr", network.names[0]]
    return [_BIN / "deepspeed", *options]


def finished(programs: Sequence[Program]) -> None:
    """Wait until all have ended well."""
    codes = ended(programs, PATIENCE_SECONDS)
    assert set(codes) == {0}, f"{codes}\n{_outputs(programs)}"


def ended(programs: Sequence[Program], seconds: float) -> list[int | None]:
    """The exit codes of programs that must end within a limit."""
    wait_for_end(programs, seconds)
    codes = [program.code for program in programs]
    assert None not in codes, f"{codes} after {seconds} s\n{_outputs(programs)}"
    return codes


def ended_with(code: int, programs: Sequence[Program], seconds: float) -> None:
    """Wait until all have ended with a code."""
    codes = ended(programs, seconds)
    assert set(codes) == {code}, f"{codes}\n{_outputs(programs)}"


def ended_after(programs: Sequence[Program], moment: float) -> float:
    """Seconds from a moment, by `time.monotonic`, to the end of the last one."""
    return max(program.ended_at - moment for program in programs if program.ended_at is not None)


def assert_said(sentence: str, programs: Sequence[Program]) -> None:
    """The first error that each program has printed has these words, and there is no traceback."""
    for program in programs:
        errors = [line for line in program.output.splitlines() if "voxtral-dist: error: " in line]
        assert errors, program.output[-3000:]
        assert sentence in errors[0]
        assert "Traceback" not in program.output, program.output


def _outputs(programs: Sequence[Program]) -> str:
    return "\n".join(f"host {program.host}:\n{program.output[-3000:]}" for program in programs)

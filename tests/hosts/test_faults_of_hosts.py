"""No fault of a host leaves another one running for longer than the limit, and the same command resumes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence

import pytest
from network import ALL, NUM_HOSTS, Network, Program
from training_runs import (
    GRACE_SECONDS,
    HANG,
    LIMIT_SECONDS,
    LOST,
    PATIENCE_SECONDS,
    Reference,
    TrainingRun,
    assert_said,
    ended_after,
    ended_with,
)

NewRun = Callable[..., TrainingRun]
References = Callable[[str], Reference]


def _lost(programs: Sequence[Program], moment: float) -> float:
    """Programs must end with the code of a lost peer within the limit and ten seconds; returns after how many."""
    ended_with(LOST, programs, LIMIT_SECONDS + GRACE_SECONDS)
    seconds = ended_after(programs, moment)
    assert seconds <= LIMIT_SECONDS + GRACE_SECONDS
    assert_said("same command on all hosts to resume", programs)
    return seconds


@pytest.mark.parametrize("missing", [2, 0])
def test_a_missing_host_ends_the_others(missing: int, network: Network, new_run: NewRun, record) -> None:
    sentence = "has not reached rank 0 at host-0:" if missing == 0 else "Nothing was heard of the ranks [2] (1 of 3)"
    network.cut(missing)
    started = time.monotonic()
    programs = new_run().start([host for host in ALL if host != missing])
    seconds = _lost(programs, started)
    assert_said(sentence, programs)
    record(
        f"host {missing} never comes (limit {LIMIT_SECONDS} s)",
        "ZeRO-3",
        f"the others end with code {LOST}",
        f"{seconds:.1f}",
    )


FAULTS: dict[str, Callable[[Network, int], None]] = {
    "cable cut for good": lambda network, host: network.cut(host),
    "all processes of the host killed": lambda network, host: network.signal(host, signal.SIGKILL),
    "host frozen": lambda network, host: network.signal(host, signal.SIGSTOP),
}


@pytest.mark.parametrize(
    ("fault", "host", "engine", "phase"),
    [
        *((fault, 2, "ZeRO-3", "stepping") for fault in FAULTS),
        *((fault, 0, "FSDP2", "stepping") for fault in FAULTS),
        *(("cable cut for good", 2, "FSDP2", phase) for phase in ("saving", "evaluating")),
        *(("cable cut for good", 1, "ZeRO-2", phase) for phase in ("starting", "exporting")),
    ],
)
def test_no_fault_of_a_host_leaves_another_one_running(
    fault: str, host: int, engine: str, phase: str, network: Network, new_run: NewRun, reference: References, record
) -> None:
    expected = reference(engine)
    run = new_run(engine=engine)
    run.hold(host, phase)
    programs = run.start()
    run.wait_until_held()
    FAULTS[fault](network, host)
    moment = time.monotonic()
    run.release()
    others = [program for program in programs if program.host != host]
    # A host that is only cut off ends too.
    seconds = _lost(programs if fault == "cable cut for good" else others, moment)
    named = "rank 0" if host == 0 else f"({host} on host-{host} since "
    assert any(named in program.output for program in others)
    if fault == "host frozen":
        # It is no better off when it goes on later.
        network.signal(host, signal.SIGCONT)
        _lost([programs[host]], time.monotonic())
    network.clear()
    run.finish_and_compare(expected)
    record(
        f"{fault}, host {host}, while {phase} (limit {LIMIT_SECONDS} s)",
        engine,
        f"the others end with code {LOST}; resumed, results equal",
        f"{seconds:.1f}",
    )


def test_a_rank_that_hangs_is_named_on_all_hosts(new_run: NewRun, reference: References, record) -> None:
    expected = reference("ZeRO-2")
    limit = 4
    run = new_run(
        engine="ZeRO-2",
        distributed={"watchdog_seconds": limit, "timeout_seconds": 60, "start_timeout_seconds": LIMIT_SECONDS},
    )
    run.hold(2, "stepping")
    programs = run.start()
    run.wait_until_held()
    moment = time.monotonic()
    ended_with(HANG, programs, PATIENCE_SECONDS)
    run.release()
    assert_said("rank 2 on host-2 (step", programs)
    stacks = sorted(path.name for path in (run.config.run_dir / "hangs").rglob("rank-*.txt"))
    assert len(stacks) == NUM_HOSTS, stacks
    run.finish_and_compare(expected)
    record(
        f"the rank of host 2 hangs (`distributed.watchdog_seconds` {limit})",
        "ZeRO-2",
        f"all end with code {HANG}, and name it; resumed, results equal",
        f"{ended_after(programs, moment):.1f}",
    )

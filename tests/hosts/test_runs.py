"""A run on three hosts is the run on one, also where a host is late, cut off for a while, stopped, or lost for good."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from network import ALL, NUM_HOSTS, Network
from training_runs import (
    ENGINES,
    LIMIT_SECONDS,
    PATIENCE_SECONDS,
    STOPPED,
    Reference,
    TrainingRun,
    ended_after,
    ended_with,
    finished,
)

from injection import FAULTY_STEP
from test_entrypoint import wait_for

NewRun = Callable[..., TrainingRun]
References = Callable[[str], Reference]
# In which a launcher passes a signal on, or a rank notices that its launcher is gone.
SIGNAL_SECONDS = 5


@pytest.mark.parametrize("engine", ENGINES)
def test_three_hosts_equal_one(engine: str, new_run: NewRun, reference: References, record) -> None:
    expected = reference(engine)
    run = new_run(engine=engine)
    started = time.monotonic()
    run.finish_and_compare(expected)
    record(
        "a run of 8 steps",
        engine,
        "losses, hypotheses and exported weights equal those of three ranks on one host, to the last bit",
        f"{time.monotonic() - started:.0f}",
    )


@pytest.mark.parametrize("late", [2, 0])
def test_a_late_host_is_waited_for(late: int, new_run: NewRun, reference: References, record) -> None:
    expected = reference("ZeRO-3")
    run = new_run()
    seconds = LIMIT_SECONDS / 2
    programs = run.start([host for host in ALL if host != late])
    time.sleep(seconds)
    assert [program.code for program in programs] == [None, None]
    finished(programs + run.start([late]))
    run.compare(expected)
    record(f"host {late} starts {seconds:.0f} s after the others", "ZeRO-3", "the run waits for it; results equal", "-")


def test_a_cable_that_is_cut_for_ten_seconds_changes_nothing(
    network: Network, new_run: NewRun, reference: References, record
) -> None:
    expected = reference("ZeRO-3")
    run = new_run(distributed={"timeout_seconds": 40, "start_timeout_seconds": 40})
    run.hold(1, "stepping")
    programs = run.start()
    run.wait_until_held()
    network.cut(1)
    run.release()
    time.sleep(10)
    network.mend(1)
    mended_at = time.monotonic()
    wait_for(lambda: max(run.losses()) > FAULTY_STEP, PATIENCE_SECONDS)
    seconds = time.monotonic() - mended_at
    finished(programs)
    run.compare(expected)
    record("cable cut for 10 s (limit 40 s)", "ZeRO-3", "the run goes on; results equal", f"{seconds:.1f} after that")


@pytest.mark.parametrize(("hosts", "engine"), [([1], "FSDP2"), ([0], "ZeRO-2"), ([0, 1, 2], "ZeRO-3")], ids=str)
def test_sigterm_saves_on_all_hosts(
    hosts: list[int], engine: str, network: Network, new_run: NewRun, reference: References, record
) -> None:
    expected = reference(engine)
    run = new_run(engine=engine)
    run.hold(1, "stepping")
    programs = run.start()
    run.wait_until_held()
    for host in hosts:
        network.signal(host, signal.SIGTERM)
    signalled_at = time.monotonic()
    run.release()
    ended_with(STOPPED, programs, PATIENCE_SECONDS)
    seconds = ended_after(programs, signalled_at)
    _is_saved_after_its_step(run)
    run.finish_and_compare(expected)
    named = "all hosts" if len(hosts) == NUM_HOSTS else f"the rank of host {hosts[0]}"
    record(
        f"SIGTERM to {named}", engine, f"all save and end with code {STOPPED}; resumed, results equal", f"{seconds:.1f}"
    )


def _is_saved_after_its_step(run: TrainingRun) -> None:
    step = max(run.losses())
    assert step in (FAULTY_STEP, FAULTY_STEP + 1)
    assert (run.config.run_dir / "checkpoints" / f"step-{step:07d}" / "complete.json").is_file()


def test_sigterm_before_training_begins_ends_all_hosts(
    network: Network, new_run: NewRun, reference: References, record
) -> None:
    expected = reference("ZeRO-3")
    run = new_run()
    run.hold(1, "starting")
    programs = run.start()
    run.wait_until_held()
    network.signal(1, signal.SIGTERM)
    signalled_at = time.monotonic()
    run.release()
    ended_with(STOPPED, programs, PATIENCE_SECONDS)
    assert not run.rows()
    run.finish_and_compare(expected)
    record(
        "SIGTERM to the rank of host 1 before training begins",
        "ZeRO-3",
        f"all end with code {STOPPED}; started again, results equal",
        f"{ended_after(programs, signalled_at):.1f}",
    )


def test_sigterm_to_the_entrypoint_of_a_host_saves_on_all(new_run: NewRun, reference: References, record) -> None:
    expected = reference("FSDP2")
    run = new_run(engine="FSDP2", distributed={"timeout_seconds": 60, "start_timeout_seconds": 300})
    run.hold(1, "stepping")
    programs = run.launch()
    run.wait_until_held()
    os.kill(programs[2].process_id, signal.SIGTERM)
    signalled_at = time.monotonic()
    time.sleep(SIGNAL_SECONDS)
    run.release()
    ended_with(STOPPED, programs, PATIENCE_SECONDS)
    seconds = ended_after(programs, signalled_at)
    _is_saved_after_its_step(run)
    run.finish_and_compare(expected)
    record(
        "SIGTERM to `docker/entrypoint` of host 2",
        "FSDP2",
        f"all save and end with code {STOPPED}; resumed, results equal",
        f"{seconds:.1f}, {SIGNAL_SECONDS} of them held up by the test",
    )


def test_a_rank_whose_launcher_is_gone_lets_all_hosts_save(
    network: Network, new_run: NewRun, reference: References, record
) -> None:
    """On SIGTERM the command `deepspeed` leaves its launcher and the rank behind."""
    expected = reference("ZeRO-3")
    run = new_run(distributed={"timeout_seconds": 60, "start_timeout_seconds": 300})
    run.hold(1, "stepping")
    programs = run.launch_by_deepspeed()
    run.wait_until_held()
    os.kill(programs[1].process_id, signal.SIGTERM)
    signalled_at = time.monotonic()
    time.sleep(SIGNAL_SECONDS)
    assert network.num_processes(1) > 0
    run.release()
    ended_with(STOPPED, [programs[0], programs[2]], PATIENCE_SECONDS)
    wait_for(lambda: not any(map(network.num_processes, ALL)), PATIENCE_SECONDS)
    seconds = time.monotonic() - signalled_at
    _is_saved_after_its_step(run)
    run.finish_and_compare(expected)
    record(
        "SIGTERM to the command `deepspeed` of host 1, which leaves its rank behind",
        "ZeRO-3",
        f"all save and end with code {STOPPED}; resumed, results equal",
        f"{seconds:.1f}, {SIGNAL_SECONDS} of them held up by the test",
    )


def test_elastic_nodes_go_on_without_a_lost_host(
    network: Network, new_run: NewRun, reference: References, record
) -> None:
    expected = reference("ZeRO-3")
    limit = 30
    run = new_run(distributed={"timeout_seconds": limit, "start_timeout_seconds": 300})
    run.hold(2, "stepping")
    programs = run.launch({"NUM_NODES": "2:3"})
    run.wait_until_held()
    network.cut(2)
    network.signal(2, signal.SIGKILL)
    lost_at = time.monotonic()
    wait_for(lambda: max(run.losses()) >= FAULTY_STEP, PATIENCE_SECONDS)
    seconds = time.monotonic() - lost_at
    finished(programs[:2])
    # Two ranks add the same gradients in another order than three.
    assert run.losses() == pytest.approx(expected.losses, rel=1e-4)
    sizes = [row["world_size"] for row in run.rows() if row.get("event") in ("started", "resumed")]
    assert sizes == [NUM_HOSTS, NUM_HOSTS - 1]
    record(
        f"host 2 without power, `NUM_NODES=2:3` (limit {limit} s)",
        "ZeRO-3",
        "two hosts go on; losses equal but for rounding",
        f"{seconds:.0f}, imports included",
    )

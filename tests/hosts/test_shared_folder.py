"""Storage of `run_dir` that does not answer for a while only delays a run, and for good ends it on all hosts."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from network import Program
from test_runs import NewRun, References
from training_runs import HANG, PATIENCE_SECONDS, assert_said, ended_with, finished

from injection import FAULTY_STEP
from test_entrypoint import wait_for

_SIZE_BYTES = 256 * 2**20


class Storage:
    """A file system of its own, which can be kept from answering whoever writes."""

    def __init__(self, image: Path, folder: Path) -> None:
        """Make it in a file, and mount it."""
        self._folder = folder
        with image.open("wb") as file:
            file.truncate(_SIZE_BYTES)
        _run("mkfs.ext4", "-q", "-O", "^has_journal", image)
        folder.mkdir()
        _run("mount", "-o", "loop", image, folder)

    def stall(self) -> None:
        """Let whoever writes wait, in the system, until `go_on`; all that was written is readable."""
        _run("fsfreeze", "--freeze", self._folder)

    def go_on(self) -> None:
        """Answer again."""
        _run("fsfreeze", "--unfreeze", self._folder)

    def remove(self) -> None:
        """Answer, and go."""
        subprocess.run(["fsfreeze", "--unfreeze", self._folder], check=False, capture_output=True)
        _run("umount", "--lazy", self._folder)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    """The file system of `run_dir`."""
    if None in map(shutil.which, ("mkfs.ext4", "fsfreeze")):
        pytest.skip("a file system of its own needs mkfs.ext4 and fsfreeze")
    try:
        storage = Storage(tmp_path / "image", tmp_path / "run")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine mounts no files: {error.stderr.strip()}")
    yield storage
    storage.remove()


def test_storage_that_stalls_for_ten_seconds_changes_nothing(
    storage: Storage, new_run: NewRun, reference: References, record
) -> None:
    expected = reference("ZeRO-3")
    run = new_run(distributed={"timeout_seconds": 60, "start_timeout_seconds": 60})
    run.hold(1, "stepping")
    programs = run.start()
    run.wait_until_held()
    storage.stall()
    run.release()
    time.sleep(10)
    assert max(run.losses()) < FAULTY_STEP
    storage.go_on()
    answered_at = time.monotonic()
    wait_for(lambda: max(run.losses()) > FAULTY_STEP, PATIENCE_SECONDS)
    seconds = time.monotonic() - answered_at
    finished(programs)
    run.compare(expected)
    record(
        "the storage of `run_dir` stalls for 10 s",
        "ZeRO-3",
        "the run goes on; results equal",
        f"{seconds:.1f} after that",
    )


def test_storage_that_stalls_for_good_ends_all_hosts(
    storage: Storage, new_run: NewRun, reference: References, record
) -> None:
    """Of a process that has ended the system keeps the threads that wait for this storage, as with no network's."""
    expected = reference("FSDP2")
    limit = 4
    run = new_run(
        engine="FSDP2", distributed={"watchdog_seconds": limit, "timeout_seconds": 60, "start_timeout_seconds": 60}
    )
    run.hold(1, "stepping")
    programs = run.start()
    run.wait_until_held()
    storage.stall()
    stalled_at = time.monotonic()
    run.release()
    wait_for(lambda: all(map(_has_exited, programs)), PATIENCE_SECONDS)
    seconds = time.monotonic() - stalled_at
    storage.go_on()
    ended_with(HANG, programs, PATIENCE_SECONDS)
    assert_said("rank 0 on host-0 (", programs)
    assert_said("Stacks could not be written to", programs)
    run.finish_and_compare(expected)
    record(
        f"the storage of `run_dir` stalls for good (`distributed.watchdog_seconds` {limit})",
        "FSDP2",
        f"all end with code {HANG}; resumed, results equal",
        f"{seconds:.1f}",
    )


def _has_exited(program: Program) -> bool:
    """Whether a process runs no more: of its threads those are left that wait for storage."""
    states = []
    for file in Path(f"/proc/{program.process_id}/task").glob("*/stat"):
        try:
            states.append(file.read_text().rpartition(")")[2].split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return {*states} <= {"D", "Z", "X"}

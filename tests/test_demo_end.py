"""What kills `make demo`, or the demo itself, ends all that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import leash

ROOT = Path(__file__).resolve().parents[1]
# In the place of the demo: a program whose command starts another one, and neither ends when it is asked to.
DEMO = f"""
import sys
sys.path.insert(0, {str(ROOT / "launch" / "demo")!r})
import leash
leash.GRACE_SECONDS = 0.3
leash.end_with_make()
stubborn = "trap '' TERM INT; sh -c 'echo $$; sleep 600' & echo $$; sleep 600; wait"
print(sys.argv[1:], flush=True)
sys.exit(leash.run_leashed(["sh", "-c", stubborn])[0])
"""


def are_gone(processes: list[int]) -> bool:
    """Whether processes have ended, or are zombies that nobody has waited for."""
    for process in processes:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            return False
    return True


@pytest.fixture
def fake_bin(tmp_path: Path) -> Path:
    """The folder of an environment whose Python runs the program above, whatever it is told to run."""
    (tmp_path / "demo.py").write_text(DEMO)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "demo.py"} "$@"\n')
    python.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("killed", "number"),
    [
        ("make", signal.SIGKILL),
        ("make", signal.SIGTERM),
        ("demo", signal.SIGKILL),
        ("demo", signal.SIGTERM),
        # Ctrl-C at a terminal reaches make and the demo; make leaves it to what it has started.
        ("both", signal.SIGINT),
    ],
)
def test_nothing_is_left_running(fake_bin: Path, killed: str, number: int) -> None:
    command = ["make", f"BIN={fake_bin}", "-o", "install", "demo"]
    if killed == "demo":
        command = [str(fake_bin / "python"), "launch/demo/demo.py"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        lines = (process.stdout.readline() for _ in range(10))
        assert any("['launch/demo/demo.py']" in line for line in lines)
        started = [int(process.stdout.readline()) for _ in range(2)]
        assert not are_gone(started)
        if killed == "both":
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        # Whoever holds the other end of the pipe has ended: no shell, command or guard is left.
        printed = process.stdout.read()
        assert process.wait() != 0
    assert "Traceback" not in printed
    deadline = time.monotonic() + 10
    while not are_gone(started):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_command_returns_and_leaves_behind() -> None:
    code, printed = leash.run_leashed(["sh", "-c", "echo out; sleep 600 & exit 7"], stdout=subprocess.PIPE)
    assert (code, printed) == (7, "out\n")
    assert leash.run_leashed(["sh", "-c", "kill -9 $$"])[0] == 137

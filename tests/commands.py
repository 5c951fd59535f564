"""Run commands of `voxtral-dist` in the process of a test."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from voxtral_dist.cli.main import main

PROGRAM = Path(sys.executable).with_name("voxtral-dist")


@dataclass(frozen=True)
class Result:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    def refusal(self, code: int = 2) -> str:
        """The error message of a refused command, which must be all that it prints."""
        assert self.code == code, self
        assert self.err.startswith("voxtral-dist: error: "), self.err
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        assert self.out == ""
        return self.err


def run_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """Run a command in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return Result(ended.value.code, output.out, output.err)


def run_program(*arguments: object) -> Result:
    """Runs the installed command in a process of its own."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [str(PROGRAM), *map(str, arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return Result(ended.returncode, ended.stdout, ended.stderr)

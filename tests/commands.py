"""Commands of `voxtral-dist` run inside of a test, and what came of them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from voxtral_dist.cli.main import main


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    def refusal(self, code: int = 2) -> str:
        """The sentence of a refused command, which says nothing else."""
        assert self.code == code, self
        assert self.err.startswith("voxtral-dist: error: "), self.err
        assert self.err.endswith("\n")
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        assert self.out == ""
        return self.err


def run_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """A command in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return Result(ended.value.code, output.out, output.err)

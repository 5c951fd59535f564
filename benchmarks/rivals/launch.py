"""Start the measured data paths, each as a process of its own environment, and read their answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
REPOSITORY = SCRIPTS.parent.parent
ENVIRONMENTS = REPOSITORY / ".rivals"
TIME_LIMIT_SECONDS = 900
NOT_MADE = "make rivals was not run"


@dataclass(frozen=True)
class Contender:
    """A data path: its script, the Python that runs it, and its other needs.

    python: None where its environment is absent.
    prepares: whether it converts the shards first.
    """

    name: str
    script: str
    python: Path | None
    prepares: bool = False

    @property
    def environment(self) -> str:
        """Description of the environment, for the result."""
        if self.python is None:
            return "none"
        return "the project's own" if self.python == Path(sys.executable) else f".rivals/{self.name}"

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and return the answer, or `{"not_run": reason}`."""
        if self.python is None:
            return {"not_run": NOT_MADE}
        command = [str(self.python), str(SCRIPTS / self.script), json.dumps(request)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS, env=self._variables(), check=False
            )
        except subprocess.TimeoutExpired:
            return {"not_run": f"no answer in {TIME_LIMIT_SECONDS} s"}
        if done.returncode:
            return {"not_run": f"failed: {done.stderr.strip()[-1000:]}"}
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    def _variables(self) -> dict[str, str]:
        variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
        # Only the project's own environment has what this package imports.
        if self.python != Path(sys.executable):
            del variables["PYTHONPATH"]
        return variables


def ours() -> Contender:
    """The loader of this project."""
    return Contender("ours", "voxtral_dist_stream.py", Path(sys.executable))


def rivals(is_quick: bool) -> list[Contender]:
    """The rivals in the order of the comparison; a quick run starts the first alone, in the project's environment."""
    return [
        Contender("webdataset", "webdataset_voxtral.py", Path(sys.executable) if is_quick else _webdataset_python()),
        Contender("datasets", "datasets_voxtral.py", None if is_quick else _python_of("datasets")),
        Contender("energon", "energon_voxtral.py", None if is_quick else _python_of("energon"), prepares=True),
        Contender("lhotse", "lhotse_voxtral.py", None if is_quick else _python_of("lhotse"), prepares=True),
    ]


def prepare(contender: Contender, request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The request with a folder that holds the shards as this contender wants them."""
    if not contender.prepares or contender.python is None:
        return dict(request)
    folder.mkdir(parents=True)
    prepared = {**request, "prepared": str(folder)}
    failure = contender.ask({**prepared, "task": "prepare"})
    if failure:
        raise RuntimeError(f"{contender.name} could not prepare the shards: {failure}")
    return prepared


def _python_of(name: str) -> Path | None:
    folder = ENVIRONMENTS / name
    return folder / "bin" / "python" if (folder / ".installed").exists() else None


def _webdataset_python() -> Path:
    """Return the project's environment, which has everything that the first rival needs."""
    return _python_of("webdataset") or Path(sys.executable)

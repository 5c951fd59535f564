"""A command run in this process."""

from collections.abc import Callable
from functools import partial

import pytest

from commands import Result, run_command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return partial(run_command, capsys)

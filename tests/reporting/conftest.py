"""A run whose results many tests show and none changes."""

from pathlib import Path

import pytest

from saved_results import write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tuned", shard_folder)

"""Every benchmark runs: quickly, without its rivals' environments, and without the real speech that may be absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from corpora import REPOSITORY

# Which take a minute and more, most of them because they start several ranks one after the other.
SLOW = {
    "building",
    "data_path",
    "encoder_memory",
    "evaluation",
    "gpu",
    "logits_memory",
    "plan_memory",
    "resume",
    "training_step",
}
BENCHMARKS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])
    for path in sorted((REPOSITORY / "benchmarks").glob("*.py"))
]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_quick_run_writes_a_positive_ratio(benchmark: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, str(benchmark), "--quick", "--output", str(output)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text(encoding="utf-8"))["ratio"] > 0

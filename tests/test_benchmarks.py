"""Every benchmark runs: quickly, without its rivals' environments, and without the real speech that may be absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from corpora import REPOSITORY

# Which take a quarter of a minute and more, most of them because they start several ranks one after the other.
SLOW = {
    "building",
    "checkpoint",
    "collate",
    "communication",
    "data_path",
    "encoder_memory",
    "evaluation",
    "gpu",
    "logits_memory",
    "memory",
    "padding",
    "plan_memory",
    "resume",
    "step_kernels",
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


def test_make_bench_runs_every_benchmark_and_hides_the_gpu_only_from_those_of_cpus() -> None:
    dry_run = ["make", "--dry-run", "bench"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    printed = subprocess.run(dry_run, cwd=REPOSITORY, env=plain, capture_output=True, text=True, check=True).stdout
    recipe = printed[printed.index("mkdir -p build/benchmarks") :].replace("\\\n", " ").splitlines()[1:]
    for_gpu = [line for line in recipe if "benchmarks/gpu.py" in line]
    assert len(for_gpu) == 1
    assert "DS_ACCELERATOR" not in for_gpu[0]
    assert "OMP_NUM_THREADS" not in for_gpu[0]
    for_cpus = " ".join(line for line in recipe if line not in for_gpu)
    assert "DS_ACCELERATOR=cpu" in for_cpus
    others = {path.name for path in (REPOSITORY / "benchmarks").glob("*.py")} - {"gpu.py"}
    assert all(f"benchmarks/{name}" in for_cpus for name in others)

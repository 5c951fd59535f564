"""The GPU benchmark without a GPU: its order and limits, its forks, and what is on disk when it ends early."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import VoxtralConfig

from voxtral_dist.model.voxtral import meta_model

from corpora import REPOSITORY
from workloads.forks import Forks
from workloads.gpu_contenders import CONTENDERS, deepspeed_file
from workloads.gpu_table import contender_table
from workloads.random_weights import write_random_weights

GPU_SCRIPT = REPOSITORY / "benchmarks" / "gpu.py"


def figures(value: int) -> dict[str, Any]:
    return {"value": value}


def fail() -> dict[str, Any]:
    print("what was printed before")
    raise ValueError("the reason")


def run_out_of_device_memory() -> dict[str, Any]:
    raise torch.OutOfMemoryError("CUDA out of memory")


def be_killed() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def sleep_with_a_worker(pid_file: Path) -> dict[str, Any]:
    worker = subprocess.Popen(["sleep", "600"])
    pid_file.write_text(str(worker.pid))
    time.sleep(600)
    return {}


@pytest.mark.parametrize(
    ("function", "reason"),
    [(fail, "failed: ValueError: the reason"), (run_out_of_device_memory, "out of memory"), (be_killed, "SIGKILL")],
)
def test_a_fork_that_fails_is_a_result_and_the_next_one_runs(function: Any, reason: str, tmp_path: Path) -> None:
    forks = Forks(tmp_path)
    assert reason in forks.run("first", function, limit=60)["not_run"]
    assert forks.run("second", figures, 7, limit=60)["value"] == 7


def test_a_failed_fork_leaves_the_end_of_its_log(tmp_path: Path) -> None:
    log = Forks(tmp_path).run("one", fail, limit=60)["log"]
    assert "what was printed before" in log
    assert "ValueError: the reason" in log


def test_a_slow_fork_is_killed_with_its_data_workers(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    result = Forks(tmp_path).run("slow", sleep_with_a_worker, pid_file, limit=2)
    assert result["not_run"] == "no answer in 2 s"
    assert 2 <= result["process_seconds"] < 30
    worker, deadline = int(pid_file.read_text()), time.monotonic() + 20
    while _is_running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_without_a_working_fork_children_are_spawned(tmp_path: Path) -> None:
    assert Forks(tmp_path, method="spawn").run("one", dict, {"value": 7}, limit=120)["value"] == 7


def test_random_weights_have_the_models_shapes_and_are_not_zeros(tiny_model: Path, tmp_path: Path) -> None:
    model = meta_model(VoxtralConfig.from_pretrained(tiny_model))
    path = tmp_path / "model.safetensors"
    write_random_weights(path, model, block_bytes=10_000)
    weights = load_file(path)
    assert {name: one.shape for name, one in weights.items()} == {
        name: one.shape for name, one in model.named_parameters()
    }
    matrices = torch.cat([one.flatten().float() for one in weights.values() if one.ndim > 1])
    assert all(torch.equal(one, torch.ones_like(one)) for one in weights.values() if one.ndim == 1)
    assert matrices.std() == pytest.approx(0.02, rel=0.05)
    assert (matrices == 0).float().mean() < 0.001


def test_offloaded_tensors_are_pinned_only_where_torch_does_not_round_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    settings = json.loads(Path(deepspeed_file("zero3_offload", tmp_path)).read_text())["zero_optimization"]
    assert [settings[key]["pin_memory"] for key in ("offload_optimizer", "offload_param")] == [False, False]
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    settings = json.loads(Path(deepspeed_file("zero2_offload", tmp_path)).read_text())["zero_optimization"]
    assert settings["stage"] == 2
    assert settings["offload_optimizer"] == {"device": "cpu", "pin_memory": True}


def test_nothing_starts_whose_predicted_time_is_not_left(tmp_path: Path) -> None:
    # It imports both trainers.
    import gpu

    options = gpu.Options(tmp_path / "gpu.json", minutes=1.5, is_quick=False, only=frozenset())
    schedule = gpu._Schedule(options, Forks(tmp_path), {}, {}, tmp_path)
    left = options.seconds_left()
    assert 0 < options.limit(CONTENDERS["fsdp2"].seconds) <= left <= 90
    assert schedule.run("fsdp2_compiled")["not_run"] == f"predicted to take 110 s, and {left:.0f} s were left"


@pytest.mark.slow
def test_a_terminated_run_leaves_what_it_measured(tmp_path: Path) -> None:
    """Both sides also learn from the same clips: their losses are equal."""
    output = tmp_path / "gpu.json"
    with _started(output, "--quick", "--only", "fsdp2,trainer,zero3_offload,fsdp2_compiled") as process:
        lines = _printed(process)
        for name in ("fsdp2", "trainer", "zero3_offload"):
            assert next(lines).startswith(f"{name}: ")
        process.send_signal(signal.SIGTERM)
        rest = "".join(lines)
    assert process.returncode == 143
    result = json.loads(output.read_text())
    assert set(result["contenders"]) == {"fsdp2", "trainer", "zero3_offload"}
    assert result["ended"] == "by a signal"
    assert result["ratio"] > 0
    assert "ours, FSDP2, `compile_blocks` | not yet measured" in rest
    assert output.with_suffix(".md").read_text().strip() in rest
    # Neither weights nor clips are left.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]
    ours, theirs, offloaded = (row["losses"] for row in result["contenders"].values())
    # Two rounds over the same micro-batches; the trainer rounds what it logs.
    assert len(ours) == len(theirs) == 10
    assert ours == pytest.approx(theirs, abs=2e-3)
    assert offloaded == pytest.approx(ours[:3], abs=1e-5)


def test_the_parent_never_touches_cuda() -> None:
    program = f"""
import sys, torch
sys.path[:0] = {[str(GPU_SCRIPT.parent), str(REPOSITORY)]!r}
def touch(*_): raise AssertionError("CUDA was asked")
torch.cuda._is_compiled = lambda: True
torch.cuda._device_count_nvml = lambda: 1
for name in ("_cuda_getDeviceCount", "_cuda_init", "_cuda_getDevice", "_cuda_getCurrentRawStream"):
    setattr(torch._C, name, touch)
import gpu
for module in gpu.IMPORTED:
    __import__(module)
assert torch.cuda.is_available() and not torch.cuda.is_initialized()
"""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_documentation_has_a_row_for_every_contender() -> None:
    documentation = (REPOSITORY / "docs" / "benchmarks.md").read_text()
    for title in (one.title for one in CONTENDERS.values()):
        assert f"| {title} |" in documentation, title
    if "not yet measured" in documentation:
        assert "\n".join(contender_table({})) in documentation


def test_wheels_are_the_pinned_versions() -> None:
    pinned = _requirements(REPOSITORY / "constraints.txt")
    wheels = _requirements(REPOSITORY / "benchmarks" / "wheels.txt")
    assert wheels.items() <= pinned.items()


def _requirements(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {re.sub("[_.]", "-", name).lower(): one for name, one in (line.split("==") for line in lines)}


@contextmanager
def _started(output: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(GPU_SCRIPT), "--output", str(output), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        yield process
        process.wait(timeout=60)
    finally:
        process.kill()


def _printed(process: subprocess.Popen[str]) -> Iterator[str]:
    """The lines of a run, without warnings of libraries before the first contender."""
    assert process.stdout is not None
    started = False
    for line in process.stdout:
        started = started or line.startswith(tuple(f"{name}:" for name in CONTENDERS))
        if started:
            yield line


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    # A zombie has ended.
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"

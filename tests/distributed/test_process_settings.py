"""Threads of ranks, and options of torch's allocators: set where the user has set none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from voxtral_dist.distributed import world
from voxtral_dist.distributed.process_settings import (
    exact_pinned_bytes,
    limit_threads,
    pin_large_tensors_exactly,
    set_allocator_defaults,
)
from voxtral_dist.errors import UserError

# Says what OpenMP would use, and by which library, after DeepSpeed's AdamW has been loaded.
THREADS_OF_RANK = """
import ctypes, os
os.sched_getaffinity = lambda process: set(range(4))
import torch
from voxtral_dist.distributed.process_settings import limit_threads
limit_threads(int(os.environ["LOCAL_WORLD_SIZE"]))
from deepspeed.ops.op_builder import CPUAdamBuilder
CPUAdamBuilder().load()
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
print(torch.get_num_threads(), len(libraries), ctypes.CDLL(libraries.pop()).omp_get_max_threads(), flush=True)
"""


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch):
    """A machine of 8 cores; what torch is told."""
    told: list[int] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(8)))
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return told


def test_each_rank_of_a_node_has_its_part_of_the_cores(threads):
    limit_threads(3)
    assert (threads, os.environ["OMP_NUM_THREADS"]) == ([2], "2")


def test_a_rank_alone_keeps_the_default_of_torch(threads):
    limit_threads(1)
    assert threads == []
    assert "OMP_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("number", ["1", "5"])
def test_what_the_user_has_set_stays(threads, monkeypatch, number):
    monkeypatch.setenv("OMP_NUM_THREADS", number)
    limit_threads(2)
    assert (threads, os.environ["OMP_NUM_THREADS"]) == ([], number)


def test_threads_are_limited_before_a_gpu_is_used(threads, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")

    def device_of(_local_rank: int) -> torch.device:
        assert threads == [2]
        raise UserError("There is no GPU here.")

    monkeypatch.setattr(world, "_device_of", device_of)
    with pytest.raises(UserError, match="There is no GPU here"), world.joined_world():
        pass


@pytest.mark.parametrize(
    ("by_user", "expected"),
    [(None, "2 1 2\n2 1 2\n"), pytest.param("1", "1 1 1\n1 1 1\n", marks=pytest.mark.slow)],
)
def test_torchrun_leaves_one_thread_only_where_the_user_has_asked_for_it(tmp_path, monkeypatch, by_user, expected):
    (tmp_path / "rank.py").write_text(THREADS_OF_RANK)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if by_user is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", by_user)
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run([*torchrun, tmp_path / "rank.py"], capture_output=True, text=True, timeout=240, check=True)
    assert "".join(line for line in ended.stdout.splitlines(keepends=True) if line[0].isdigit()) == expected


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU for the choice of a device, and an environment without the allocators' options."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_has_segments_that_grow():
    assert world.alone().device == torch.device("cuda", 0)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch's allocators are told after their start, with the environment's options."""
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: os.environ["PYTORCH_ALLOC_CONF"])
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    return told


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("by_user", [None, "max_split_size_mb:512"])
def test_large_tensors_are_pinned_exactly_where_torch_knows_how(options, monkeypatch, by_user):
    if by_user is not None:
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", by_user)
    set_allocator_defaults()
    pin_large_tensors_exactly()
    known = (Path(torch.__file__).parent / "lib" / "libc10.so").read_bytes()
    before = by_user or "expandable_segments:True"
    assert options == [f"{before},pinned_max_cached_size_mb:16"] * (b"pinned_max_cached_size_mb" in known)
    assert exact_pinned_bytes() == (16 * 2**20 if options else None)


@pytest.mark.usefixtures("gpu")
def test_an_option_that_torch_does_not_know_is_not_set(options, monkeypatch):
    # AllocatorConfig.h of torch 2.11 has no pinned_max_cached_size_mb.
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0+cu130"))
    set_allocator_defaults()
    pin_large_tensors_exactly()
    assert options == []
    assert exact_pinned_bytes() is None


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("option", ["pinned_max_cached_size_mb:4096", "pinned_max_round_threshold_mb:1"])
def test_what_the_user_says_about_pinned_memory_stays(options, monkeypatch, option):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", option)
    pin_large_tensors_exactly()
    assert options == []


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_the_options_of_the_user_stay(monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:512")
    set_allocator_defaults()
    assert os.environ[name] == "max_split_size_mb:512"
    assert name == "PYTORCH_ALLOC_CONF" or "PYTORCH_ALLOC_CONF" not in os.environ


def test_a_cpu_needs_no_options_of_allocators(monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    world.alone()
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_a_world_of_one_process_leaves_no_variables_that_others_take_for_a_launchers(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with world.joined_world():
        assert os.environ["LOCAL_RANK"] == "0", "DeepSpeed reads it"
    assert not [name for name in names if name in os.environ]

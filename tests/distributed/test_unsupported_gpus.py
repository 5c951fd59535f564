"""GPUs that torch has no kernels for, or that have no bfloat16, are refused at the start with what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from voxtral_dist import doctor
from voxtral_dist.cli.main import build_parser
from voxtral_dist.config import RunConfig
from voxtral_dist.distributed import world
from voxtral_dist.distributed.devices import refuse_unsupported_gpu
from voxtral_dist.distributed.world import joined_world
from voxtral_dist.engine.build import check_engine
from voxtral_dist.errors import UserError
from voxtral_dist.model.weights import load_for_inference

from runs import run_config

CUDA = torch.device("cuda", 0)
# torch 2.13 on PyPI is built for CUDA 13.0, before 2.11 it was for 12.8.
CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90a"]
GPUS = {
    "Tesla V100-SXM2-32GB": (7, 0),
    "Tesla T4": (7, 5),
    "NVIDIA A10": (8, 6),
    "NVIDIA L4": (8, 9),
    "NVIDIA H200": (9, 0),
    "NVIDIA B300": (10, 3),
    "NVIDIA GB10": (12, 1),
    "a later one": (13, 0),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch says of the GPU, and of itself."""
    said = SimpleNamespace(name="Tesla T4", built_for=CUDA_13)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: said.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: GPUS[said.name])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=GPUS[said.name][0]))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: said.built_for)
    return said


@pytest.mark.parametrize(
    ("built_for", "without_kernels"),
    [
        (CUDA_13, {"Tesla V100-SXM2-32GB"}),
        (CUDA_12, {"NVIDIA B300", "NVIDIA GB10", "a later one"}),
        ([], set()),
    ],
)
def test_gpus_without_kernels(gpu: SimpleNamespace, built_for: list[str], without_kernels: set[str]) -> None:
    gpu.built_for = built_for
    refused = set()
    for gpu.name in GPUS:
        try:
            refuse_unsupported_gpu(CUDA)
        except UserError:
            refused.add(gpu.name)
    assert refused == without_kernels
    refuse_unsupported_gpu(torch.device("cpu"))


def test_ranks_on_such_a_gpu_end_before_they_meet(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.name = "Tesla V100-SXM2-32GB"
    monkeypatch.setattr(world, "_device_of", lambda local_rank: CUDA)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    said = r"no kernels for Tesla V100-SXM2-32GB \(compute capability 7\.0\), but for sm_75, .*such as 12\.6 for a V100"
    with pytest.raises(UserError, match=said), joined_world():
        pytest.fail("it has joined")


def test_bfloat16_is_refused_on_a_gpu_without_it(
    gpu: SimpleNamespace, tiny_model: Path, shard_folder: Path, tmp_path: Path
) -> None:
    config = run_config(tmp_path / "run", tiny_model, shard_folder, num_steps=3)

    def training_in(precision: str) -> RunConfig:
        return config.model_copy(update={"model": config.model.model_copy(update={"precision": precision})})

    check_engine(training_in("float32"), 1, CUDA)
    with pytest.raises(UserError, match=r"bfloat16 needs .* but this is a Tesla T4: set `model.precision: float16`"):
        check_engine(training_in("bfloat16"), 1, CUDA)
    with pytest.raises(UserError, match=r"Tesla T4: choose float16 \(`--precision float16`\)"):
        load_for_inference(str(tiny_model), CUDA, "bfloat16")
    assert build_parser().parse_args(["evaluate", "m", "s", "--precision", "float16"]).precision == "float16"
    gpu.name = "NVIDIA A10"
    check_engine(training_in("bfloat16"), 1, CUDA)


def test_doctor_says_what_gpus_lack(gpu: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor._can_compute()
    assert "Tesla T4: set `model.precision: float16`, and decode" in capsys.readouterr().out
    gpu.name = "Tesla V100-SXM2-32GB"
    assert not doctor._can_compute()
    assert "has no kernels for Tesla V100" in capsys.readouterr().out
    gpu.name = "NVIDIA H200"
    assert doctor._can_compute()
    assert capsys.readouterr().out == ""

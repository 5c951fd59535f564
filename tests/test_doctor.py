"""Extensions that DeepSpeed was installed with need no compiler, as in the image; what is missing gets a message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from voxtral_dist.engine.zero.extensions import needed_extensions, refuse_without_nvme_support
from voxtral_dist.errors import UserError

# Python runs it at its start. DeepSpeed then finds what a build with these extensions would have installed.
SITECUSTOMIZE = """
import sys, types

import torch

ops = {"deepspeed_shm_comm": "comm", "cpu_adam": "adam", "pin_memory": "pin_memory", "async_io": "aio"}
installed = types.ModuleType("deepspeed.git_version_info_installed")
installed.version, installed.git_hash, installed.git_branch = "0", "", ""
installed.installed_ops, installed.accelerator_name = dict.fromkeys(ops, True), "cpu"
installed.torch_info = {"version": ".".join(torch.__version__.split(".")[:2])}
sys.modules[installed.__name__] = installed
for name, package in ops.items():
    sys.modules[f"deepspeed.ops.{package}.{name}_op"] = types.ModuleType(name)
"""


def doctor(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`voxtral-dist doctor` on a machine without any program, hence without compilers."""
    environment = os.environ | {
        "PATH": str(folder),
        "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "DS_ACCELERATOR": "cpu",
    }
    command = [str(Path(sys.executable).with_name("voxtral-dist")), "doctor", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_doctor_accepts_a_machine_without_compilers_where_every_extension_is_installed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    result = doctor(tmp_path, "--with-nvme")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "DeepSpeed was installed with deepspeed_shm_comm, cpu_adam, pin_memory, async_io." in result.stdout
    assert "compiler" not in result.stdout


def test_doctor_refuses_a_machine_without_compilers_where_none_is_installed(tmp_path: Path) -> None:
    result = doctor(tmp_path)
    assert result.returncode == 2
    assert "DeepSpeed compiles deepspeed_shm_comm on this machine." in result.stdout
    assert "apt install g++ python3-dev" in result.stdout


@pytest.fixture
def gpu_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's choices on a host with GPUs and without CUDA's toolkit, libaio and compilers."""
    from deepspeed.ops.op_builder.async_io import AsyncIOBuilder

    builders = {"AsyncIOBuilder": AsyncIOBuilder}
    accelerator = SimpleNamespace(device_name=lambda: "cuda", create_op_builder=lambda name: builders[name]())
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    monkeypatch.setenv("PATH", "")


def install(monkeypatch: pytest.MonkeyPatch, *names: str, device: str = "cuda") -> None:
    monkeypatch.setattr("deepspeed.git_version_info.installed_ops", dict.fromkeys(names, 1))
    monkeypatch.setattr("deepspeed.git_version_info.accelerator_name", device)


@pytest.mark.usefixtures("gpu_host")
def test_gpu_runs_without_offload_need_no_extension() -> None:
    assert needed_extensions(with_offload=False, with_nvme=False) == ()
    assert [one.name for one in needed_extensions(with_offload=True, with_nvme=False)] == ["cpu_adam"]


@pytest.mark.usefixtures("gpu_host")
def test_installed_extensions_for_nvme_are_not_asked_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "pin_memory", "async_io")
    refuse_without_nvme_support()


@pytest.mark.usefixtures("gpu_host")
@pytest.mark.parametrize(
    ("names", "device"), [([], "cuda"), (["async_io"], "cuda"), (["pin_memory", "async_io"], "cpu")]
)
def test_nvme_on_a_gpu_without_cudas_toolkit_is_refused_with_a_message(
    monkeypatch: pytest.MonkeyPatch, names: list[str], device: str
) -> None:
    install(monkeypatch, *names, device=device)
    with pytest.raises(UserError, match="set CUDA_HOME"):
        refuse_without_nvme_support()


@pytest.mark.usefixtures("gpu_host")
def test_nvme_on_a_gpu_without_libaio_is_refused_with_a_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    with pytest.raises(UserError, match="needs libaio"):
        refuse_without_nvme_support()

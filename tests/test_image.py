"""The image has what DeepSpeed and Triton load or compile, in the stage that uses it."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from voxtral_dist.config import load_config, recipes
from voxtral_dist.engine.zero import extensions

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"


@dataclass(frozen=True)
class Stage:
    """A stage of the image: its name and base, and its instructions in order, each with its arguments."""

    name: str
    base: str
    instructions: list[tuple[str, str]]

    def commands(self) -> Iterator[list[str]]:
        """The words of each shell command."""
        for instruction, arguments in self.instructions:
            if instruction == "RUN":
                for command in re.sub(r"^(--\S+\s+)+", "", arguments).split("&&"):
                    yield shlex.split(command)

    def packages(self) -> set[str]:
        """Names of the Debian packages."""
        installed = (words[2:] for words in self.commands() if words[:2] == ["apt-get", "install"])
        return {word for words in installed for word in words if not word.startswith("-")}

    def variables_of(self, *command: str) -> dict[str, str]:
        """The variables that are set for the first command that begins with these words and names DeepSpeed."""
        for words in self.commands():
            assignments = [word for word in words if re.match(r"[A-Z_]+=", word)]
            rest = [word for word in words if word not in assignments]
            if tuple(rest[: len(command)]) == command and any("deepspeed" in word for word in rest):
                return dict(word.split("=", 1) for word in assignments)
        raise AssertionError(f"no command {command} on deepspeed")


def stages() -> dict[str, Stage]:
    """All stages by name; the last one has none."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    instructions = "\n".join(lines).replace("\\\n", " ").splitlines()
    found: list[Stage] = []
    for instruction, _, arguments in (line.strip().partition(" ") for line in instructions if line.strip()):
        if instruction == "FROM":
            base, _, name = arguments.partition(" AS ")
            found.append(Stage(name, base, []))
        elif found:
            found[-1].instructions.append((instruction, arguments.strip()))
    return {stage.name: stage for stage in found}


def test_every_variant_of_the_image_has_its_stages() -> None:
    found = stages()
    assert found["build"].base == "build-${DEVICE}"
    assert found[""].base == "network-${NETWORK}"
    assert {found[f"network-{network}"].base for network in ("none", "efa")} == {"run-${DEVICE}"}
    images = {name: stage.base for name, stage in found.items() if stage.base.startswith("docker.io/")}
    assert set(images) == {"build-cuda", "build-cpu", "run-cuda", "run-cpu"}
    # The environment's Python is the one whose header is installed: all bases have the same release.
    assert all(
        base.endswith("ubuntu${UBUNTU_VERSION}") or base.endswith("ubuntu:${UBUNTU_VERSION}")
        for base in images.values()
    )
    assert [name for name, base in images.items() if "-devel-" in base] == ["build-cuda"]


def test_extensions_are_compiled_for_any_machine_of_an_architecture() -> None:
    (line,) = (arguments for instruction, arguments in stages()["build"].instructions if "-march=native" in arguments)
    assert {"amd64) march=x86-64-v3", "arm64) march=armv8.2-a"} <= {
        part.strip() for part in re.split(r" in | ;;", line)
    }
    assert "*) exit 1" in line


def test_the_build_installs_deepspeed_with_every_extension_that_gpu_runs_load() -> None:
    from deepspeed.ops.op_builder.async_io import AsyncIOBuilder
    from deepspeed.ops.op_builder.cpu.cpu_adam import CPUAdamBuilder
    from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder

    variables = stages()["build"].variables_of("pip", "install")
    assert variables.pop("DS_ACCELERATOR") == "${DEVICE}"
    # Ranks on CPUs load it.
    assert variables.pop("DS_BUILD_SHM_COMM") == "${shared_memory}"
    builders = {builder.NAME: builder for builder in (AsyncIOBuilder, PinMemoryBuilder, CPUAdamBuilder)}
    needed = (extensions._CPU_ADAM, *extensions._NVME)
    assert variables == {builders[extension.name].BUILD_VAR: "1" for extension in needed}


def test_the_image_has_the_packages_that_recipes_and_their_metrics_need() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    build = stages()["build"]
    installed = next(word for words in build.commands() for word in words if word.startswith("/opt/voxtral-dist["))
    packages = {package for extra in installed.split("[")[1].strip("]").split(",") for package in extras[extra]}
    runs = [load_config(path) for path in recipes().values()]
    needed = {"tensorboard" for run in runs if run.metrics.tensorboard}
    needed |= {tracker for run in runs for tracker in run.metrics.trackers}
    for lora in (run.trainable.lora for run in runs if run.trainable.lora):
        needed |= {"lora", *(["qlora"] if lora.quantized else [])}
    needed |= {"float8" for run in runs if run.model.float8}
    assert {"lora", "qlora", "tensorboard"} <= needed
    assert {package for extra in needed for package in extras[extra]} <= packages


def test_the_last_stage_has_what_the_extensions_were_linked_to() -> None:
    build, last = stages()["build"], stages()[""]
    assert "libaio-dev" in build.packages()
    assert "libaio1t64" in last.packages()
    assert ("COPY", "--from=build /opt/venv /opt/venv") in last.instructions


def test_the_last_stage_has_the_compilers_and_headers_of_triton_and_torch_compile() -> None:
    last = stages()[""]
    assert {"gcc", "g++", "libc6-dev", "python3-dev"} <= last.packages()

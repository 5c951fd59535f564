"""Tasks for SkyPilot's managed jobs: https://docs.skypilot.co/en/latest/reference/yaml-spec.html."""

from __future__ import annotations

import shlex
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field

from voxtral_dist.launching.exit_codes import SAVED

_IMAGE_FOLDER = "/opt/voxtral-dist"


class SkySettings(BaseModel):
    """Nodes of a run by SkyPilot; `voxtral-dist launch skypilot --help` explains each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str
    is_file: bool
    overrides: tuple[str, ...] = ()
    name: Annotated[str, Field(pattern=r"^[a-zA-Z]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?$")] = "voxtral"
    nodes: Annotated[int, Field(gt=0)]
    gpus: Annotated[int, Field(gt=0)]
    gpu: Annotated[str, Field(pattern=r"^[\w-]+$")]
    infra: Annotated[str, Field(pattern=r"^[\w./*-]+$")] | None = None
    disk_size: Annotated[int, Field(gt=0)] = 512
    volume: Annotated[str, Field(pattern=r"^[\w-]+$")] | None = None
    image: Annotated[str, Field(pattern=r"^\S+$")] | None = None
    spot: bool = False
    max_restarts: Annotated[int, Field(ge=0)] = 20


class JobRecovery(BaseModel):
    """Restarts: a preemption and the code of a saved run do not count."""

    max_restarts_on_errors: int
    recover_on_exit_codes: list[int] = list(SAVED)


class Resources(BaseModel):
    """A node."""

    infra: str | None
    accelerators: str
    use_spot: bool | None
    disk_size: int
    network_tier: str | None
    image_id: str | None
    job_recovery: JobRecovery


class Task(BaseModel):
    """A task, whose commands run on every node."""

    name: str
    num_nodes: int
    resources: Resources
    workdir: str | None
    file_mounts: dict[str, str] | None
    volumes: dict[str, str] | None
    secrets: dict[str, None]
    envs: dict[str, str]
    setup: str | None
    run: str


def sky_task(settings: SkySettings) -> str:
    """The YAML of a task."""
    config, mounts = settings.config, {}
    if settings.is_file:
        config = "/config/config.yaml"
        mounts[config] = settings.config
    words = [*("--config", config), *(word for one in settings.overrides for word in ("--set", one))]
    prepare = f"cd {_IMAGE_FOLDER}" if settings.image else "source .venv/bin/activate"
    entrypoint = "voxtral-entrypoint" if settings.image else "docker/entrypoint"
    task = Task(
        name=settings.name,
        num_nodes=settings.nodes,
        resources=Resources(
            infra=settings.infra,
            accelerators=f"{settings.gpu}:{settings.gpus}",
            use_spot=True if settings.spot else None,
            disk_size=settings.disk_size,
            network_tier="best" if settings.nodes > 1 else None,
            image_id=None if settings.image is None else f"docker:{settings.image}",
            job_recovery=JobRecovery(max_restarts_on_errors=settings.max_restarts),
        ),
        workdir=None if settings.image else ".",
        file_mounts=mounts or None,
        volumes=None if settings.volume is None else {"/runs": settings.volume},
        secrets={"HF_TOKEN": None},
        envs={"PROCS_PER_NODE": str(settings.gpus), "NCCL_DEBUG": "WARN"},
        setup=None if settings.image else "make install\n",
        run="\n".join([prepare, f"{entrypoint} {shlex.join(words)}", ""]),
    )
    head = "# Written by `voxtral-dist launch skypilot`. Start it by `sky jobs launch --secret HF_TOKEN FILE`.\n"
    tree = task.model_dump(exclude_none=True) | {"secrets": task.secrets}
    return head + yaml.safe_dump(tree, sort_keys=False, width=120)

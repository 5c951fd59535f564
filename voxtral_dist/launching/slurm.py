"""Batch scripts for Slurm."""

from __future__ import annotations

import shlex
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from voxtral_dist.launching.exit_codes import SAVED, WOULD_FAIL_AGAIN
from voxtral_dist.launching.texts import matching

Container = Literal["pyxis", "enroot", "apptainer"]
IMAGE_ENTRYPOINT = "/usr/local/bin/voxtral-entrypoint"
_SHORTEST_NOTICE = 120


Word = Annotated[str, matching(r"[\w./:@%+,=#-]+", "must be one word of letters, digits and ._/:@%+,=#-")]
Time = Annotated[str, matching(r"(\d+-)?\d+(:\d\d){0,2}", "must be a time of Slurm, such as 24:00:00 or 2-00:00:00")]
Mount = Annotated[
    str,
    matching(
        r"/[\w./+-]*(:/[\w./+-]*(:ro)?)?", "must be a folder, or FOLDER:FOLDER_IN_CONTAINER, both with whole paths"
    ),
]


class SlurmSettings(BaseModel):
    """Nodes and limits of a run on Slurm; `voxtral-dist launch slurm --help` explains each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str
    overrides: tuple[str, ...] = ()
    name: Word = "voxtral"
    nodes: Annotated[int, Field(gt=0)]
    min_nodes: Annotated[int, Field(gt=0)] | None = None
    gpus: Annotated[int, Field(gt=0)]
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time: Time | None = None
    cpus: Annotated[int, Field(gt=0)] | None = None
    socket_interface: Word | None = None
    folder: str = "."
    venv: str | None = None
    container: Container | None = None
    image: Word | None = None
    mounts: tuple[Mount, ...] = ()
    max_restarts: Annotated[int, Field(ge=0)] = 20
    grace_seconds: Annotated[int, Field(gt=0)]

    @model_validator(mode="after")
    def _starts_one_way(self) -> SlurmSettings:
        if (self.container is None) != (self.image is None):
            raise ValueError("`--container` and `--image` belong together: give both or none")
        if self.container is not None and self.venv is not None:
            raise ValueError("`--venv` and `--container` exclude each other: remove one of them")
        return self

    @property
    def notice_seconds(self) -> int:
        """Time between the signal and the end of the job."""
        return max(_SHORTEST_NOTICE, self.grace_seconds)


def batch_script(settings: SlurmSettings) -> str:
    """The script for `sbatch`."""
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in _options(settings)), _HEAD, *_before(settings)]
    codes = {"SAVED": _pattern(SAVED), "AGAIN": _pattern(WOULD_FAIL_AGAIN)}
    start = " \\\n    ".join(_start(settings))
    body = _BODY.replace("@START@", start).replace("@MAX_RESTARTS@", str(settings.max_restarts))
    for name, pattern in codes.items():
        body = body.replace(f"@{name}@", pattern)
    return "\n".join([*lines, body])


def _pattern(codes: tuple[int, ...]) -> str:
    return " | ".join(map(str, codes))


def _options(settings: SlurmSettings) -> list[str]:
    given = {
        "job-name": settings.name,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "time": settings.time,
        "nodes": str(settings.nodes) if settings.min_nodes is None else f"{settings.min_nodes}-{settings.nodes}",
        "ntasks-per-node": "1",
        "gpus-per-node": str(settings.gpus),
        "cpus-per-task": None if settings.cpus is None else str(settings.cpus),
    }
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return [
        *options,
        "--exclusive",
        # After a preemption or a lost node Slurm itself queues it again; its output goes on in the same file.
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{settings.notice_seconds}",
        f"--output={settings.name}-%j.txt",
    ]


_HEAD = """
# Written by `voxtral-dist launch slurm`; rerun that command to change it. Slurm signals this script before its time
# ends (USR1), and when it is preempted or cancelled (TERM); srun passes that on, and the ranks save. Then the job
# queues itself again; after TERM Slurm decides that.
set -uo pipefail"""


def _before(settings: SlurmSettings) -> list[str]:
    lines = [f"cd {shlex.quote(settings.folder)} || exit 2"]
    if settings.venv is not None:
        activate = shlex.quote(str(PurePosixPath(settings.venv) / "bin" / "activate"))
        lines += ["# shellcheck disable=SC1091", f"source {activate} || exit 2"]
    if settings.container is not None:
        lines += [
            "# Containers have no scontrol to find it by.",
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head --lines 1)',
            "export MASTER_ADDR",
        ]
    lines += [f"export PROCS_PER_NODE={settings.gpus}", "export NCCL_DEBUG=WARN"]
    if settings.socket_interface is not None:
        lines.append(f"export NCCL_SOCKET_IFNAME={settings.socket_interface}")
    return lines


# Enroot starts with an empty environment.
_ENROOT_VARIABLES = (
    *("SLURM_NODEID", "SLURM_LOCALID", "SLURM_NNODES", "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID", "SLURM_JOB_NODELIST"),
    *("MASTER_ADDR", "PROCS_PER_NODE", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES", "HF_TOKEN"),
)


def _start(settings: SlurmSettings) -> list[str]:
    """The words of the command that starts each node's ranks, some words a line."""
    # A minute after the first node has ended, others that have not are ended too.
    lines = ["srun --ntasks-per-node=1 --wait=60"]
    image = shlex.quote(settings.image or "")
    match settings.container:
        case "pyxis":
            lines.append(f"--container-image={image} --no-container-mount-home --container-workdir=/opt/voxtral-dist")
            if settings.mounts:
                lines.append(f"--container-mounts={','.join(settings.mounts)}")
        case "enroot":
            lines.append("enroot start --rw")
            lines += [f"--mount {mount}" for mount in settings.mounts]
            lines += [f"--env {name}" for name in _ENROOT_VARIABLES]
            lines.append(image)
        case "apptainer":
            lines.append("apptainer exec --nv --pwd /opt/voxtral-dist")
            lines += [f"--bind {mount}" for mount in settings.mounts]
            lines.append(image)
    lines.append("docker/entrypoint" if settings.container is None else IMAGE_ENTRYPOINT)
    lines.append(f"--config {shlex.quote(settings.config)}")
    lines += [f"--set {shlex.quote(override)}" for override in settings.overrides]
    return lines


_BODY = """
step="" interrupted=0 terminated=0
# shellcheck disable=SC2317,SC2329 # traps call it
stop() {
    interrupted=1
    [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true
}
trap stop USR1
trap 'terminated=1; stop' TERM
@START@ &
step=$!
wait "$step"
code=$?
# A signal interrupts `wait`: wait again until the step has ended. 127: it had ended when the signal came.
while ((interrupted)); do
    interrupted=0
    wait "$step" 2>/dev/null
    again=$?
    ((again == 127)) || code=$again
done
((!terminated)) || exit "$code"

failures="${SLURM_JOB_NAME:-voxtral}-$SLURM_JOB_ID.failures"
case $code in
    0) exit 0 ;;
    @SAVED@) # Saved: start again without counting.
        scontrol requeue "$SLURM_JOB_ID" && exit 0
        exit "$code"
        ;;
    @AGAIN@) # The same mistake would come again.
        exit "$code"
        ;;
esac
# Anything else may pass, but not forever: one line a failure.
printf '%s exit code %s\\n' "$(date --iso-8601=seconds)" "$code" >>"$failures"
if (($(wc --lines <"$failures") <= @MAX_RESTARTS@)); then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$code"
"""

"""What a cluster is asked for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from voxtral_dist.launching.texts import matching

Kind = Literal["jobset", "trainjob", "pytorchjob", "indexed-job"]
Network = Literal["rdma", "efa", "tcp"]


# The names of pods and their hosts are this one and some characters more, 63 in all.
Label = Annotated[
    str,
    matching(
        r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?",
        "must be up to 40 lower-case letters, digits and hyphens, beginning with a letter",
    ),
]
Quantity = Annotated[
    str, matching(r"[1-9][0-9]*(m|k|M|G|T|Ki|Mi|Gi|Ti)?", "must be a quantity of Kubernetes, such as 96 or 960Gi")
]
ObjectName = Annotated[
    str,
    matching(
        r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?",
        "must be the name of an object: lower-case letters, digits, hyphens and dots",
    ),
]
Seconds = Annotated[int, Field(gt=0)]


class ClaimSettings(BaseModel):
    """Volume claims of runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Label = "voxtral"
    namespace: Label | None = None
    data_size: Quantity | None = None
    runs_size: Quantity = "1Ti"
    storage_class: ObjectName | None = None


class KubernetesSettings(BaseModel):
    """Nodes, volumes and policies of a run on Kubernetes; `voxtral-dist launch kubernetes --help` explains each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: Annotated[str, Field(min_length=1, pattern=r"^\S+$")]
    nodes: Annotated[int, Field(gt=0)]
    min_nodes: Annotated[int, Field(gt=0)] | None = None
    gpus: Annotated[int, Field(gt=0)]
    kind: Kind = "jobset"
    name: Label = "voxtral"
    namespace: Label | None = None
    network: Network = "tcp"
    rdma_resource: str = "rdma/hca_shared_devices_a"
    rdma_devices: Annotated[int, Field(gt=0)] | None = None
    socket_interface: str = "eth0"
    cpus: Quantity = "96"
    memory: Quantity = "960Gi"
    shared_memory: Quantity = "64Gi"
    ephemeral_storage: Quantity | None = None
    hub_size: Quantity = "100Gi"
    config_map: ObjectName | None = None
    data_claim: ObjectName | None = None
    runs_claim: ObjectName | None = None
    service_account: ObjectName | None = None
    secret: ObjectName | None = None
    node_cache: Annotated[str, Field(pattern=r"^/")] | None = None
    priority_class: ObjectName | None = None
    queue: ObjectName | None = None
    topology: str | None = None
    topology_required: bool = False
    ttl_seconds: Seconds | None = None
    deadline_seconds: Seconds | None = None
    max_restarts: Annotated[int, Field(ge=0)] = 20
    user: Annotated[int, Field(ge=0)] = 10001
    grace_seconds: Seconds

    @model_validator(mode="after")
    def _is_possible(self) -> KubernetesSettings:
        if self.kind == "trainjob" and self.ttl_seconds is not None:
            raise ValueError("`--ttl-seconds` is not possible with a TrainJob, which has no such field: remove it")
        if self.min_nodes is not None and self.kind != "indexed-job":
            raise ValueError(
                "`--nodes MIN:MAX` is possible with `--kind indexed-job` alone: the others start all pods again when "
                "one is lost"
            )
        if self.topology_required and self.topology is None:
            raise ValueError("`--topology-required` needs `--topology`, the label of nodes that names their domain")
        return self

    @property
    def labels(self) -> dict[str, str]:
        """Labels of all objects and pods of the run."""
        return {"app.kubernetes.io/name": "voxtral-dist", "app.kubernetes.io/instance": self.name}

    @property
    def names_of_claims(self) -> tuple[str, str]:
        """Claims of the data and of the runs."""
        return self.data_claim or f"{self.name}-data", self.runs_claim or f"{self.name}-runs"

"""Kubernetes' own objects, as far as manifests of runs use them: names and meanings are those of its API reference.

https://kubernetes.io/docs/reference/kubernetes-api/
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class Model(BaseModel):
    """A part of a manifest. Fields that are None are left out."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)

    def tree(self) -> dict[str, Any]:
        """The manifest as YAML has it."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class ObjectMeta(Model):
    """Name, namespace, labels and annotations; a pod template has no name."""

    name: str | None = None
    namespace: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class ConfigMap(Model):
    """Texts that pods mount as files."""

    api_version: Literal["v1"] = "v1"
    kind: Literal["ConfigMap"] = "ConfigMap"
    metadata: ObjectMeta
    data: dict[str, str]


class VolumeResources(Model):
    """The requested size of a claim."""

    requests: dict[str, str]


class ClaimSpec(Model):
    """Access and size of a claim."""

    access_modes: tuple[Literal["ReadWriteMany"], ...] = ("ReadWriteMany",)
    storage_class_name: str | None = None
    resources: VolumeResources


class PersistentVolumeClaim(Model):
    """A claim that all nodes mount at once."""

    api_version: Literal["v1"] = "v1"
    kind: Literal["PersistentVolumeClaim"] = "PersistentVolumeClaim"
    metadata: ObjectMeta
    spec: ClaimSpec


class ServiceSpec(Model):
    """A headless service, which gives pods names."""

    cluster_ip: Literal["None"] = Field(default="None", alias="clusterIP")
    publish_not_ready_addresses: bool = True
    selector: dict[str, str]


class Service(Model):
    """Names of pods, known before they are ready."""

    api_version: Literal["v1"] = "v1"
    kind: Literal["Service"] = "Service"
    metadata: ObjectMeta
    spec: ServiceSpec


class FieldRef(Model):
    """A field of the pod."""

    field_path: str


class SecretKeyRef(Model):
    """A key of a secret."""

    name: str
    key: str
    optional: bool | None = None


class EnvVarSource(Model):
    """Where a variable's value comes from."""

    field_ref: FieldRef | None = None
    secret_key_ref: SecretKeyRef | None = None


class EnvVar(Model):
    """An environment variable, with a value or a source."""

    name: str
    value: str | None = None
    value_from: EnvVarSource | None = None


class SecretRef(Model):
    """A secret."""

    name: str


class EnvFrom(Model):
    """All keys of a secret as variables."""

    secret_ref: SecretRef


class Resources(Model):
    """Limits of a container; requests are the same where only limits are given."""

    limits: dict[str, str]


class Capabilities(Model):
    """Linux capabilities."""

    drop: tuple[str, ...] = ("ALL",)
    add: tuple[str, ...] | None = None


class SecurityContext(Model):
    """Rights of a container."""

    allow_privilege_escalation: bool = False
    capabilities: Capabilities = Capabilities()


class VolumeMount(Model):
    """A volume in a container."""

    name: str
    mount_path: str
    read_only: bool | None = None


class HttpGet(Model):
    """A request of a probe."""

    path: str
    port: int


class Probe(Model):
    """A check of a container by the node."""

    http_get: HttpGet
    initial_delay_seconds: int | None = None
    period_seconds: int
    timeout_seconds: int | None = None
    failure_threshold: int


class ContainerPort(Model):
    """A port that a container serves."""

    name: str
    container_port: int
    protocol: Literal["TCP"] = "TCP"


class Container(Model):
    """The container of a node's ranks."""

    name: str
    image: str
    args: tuple[str, ...]
    ports: tuple[ContainerPort, ...] | None = None
    env: tuple[EnvVar, ...]
    env_from: tuple[EnvFrom, ...] | None = None
    resources: Resources
    startup_probe: Probe | None = None
    liveness_probe: Probe | None = None
    readiness_probe: Probe | None = None
    security_context: SecurityContext
    volume_mounts: tuple[VolumeMount, ...]


class ConfigMapSource(Model):
    """A ConfigMap as a folder."""

    name: str


class ClaimSource(Model):
    """A claim as a folder."""

    claim_name: str


class EmptyDir(Model):
    """A folder that lives as long as its pod."""

    medium: Literal["Memory"] | None = None
    size_limit: str | None = None


class HostPath(Model):
    """A folder of the node's own disk, which outlives pods."""

    path: str
    type: Literal["DirectoryOrCreate"] = "DirectoryOrCreate"


class Volume(Model):
    """A volume of a pod, of one source."""

    name: str
    config_map: ConfigMapSource | None = None
    persistent_volume_claim: ClaimSource | None = None
    empty_dir: EmptyDir | None = None
    host_path: HostPath | None = None


class SeccompProfile(Model):
    """System calls that a pod may make."""

    type: Literal["RuntimeDefault"] = "RuntimeDefault"


class PodSecurityContext(Model):
    """The user of a pod, and the group of its volumes."""

    run_as_non_root: bool
    run_as_user: int
    run_as_group: int
    fs_group: int
    fs_group_change_policy: Literal["OnRootMismatch"] = "OnRootMismatch"
    seccomp_profile: SeccompProfile = SeccompProfile()


class Toleration(Model):
    """A taint that a pod accepts."""

    key: str
    operator: Literal["Exists"] = "Exists"
    effect: Literal["NoSchedule"] = "NoSchedule"


class LabelSelector(Model):
    """Pods by their labels."""

    match_labels: dict[str, str]


class PodAffinityTerm(Model):
    """Pods that shall be in one domain, such as a rack or a block of switches."""

    label_selector: LabelSelector
    topology_key: str


class WeightedPodAffinityTerm(Model):
    """A preference."""

    weight: int
    pod_affinity_term: PodAffinityTerm


class PodAffinity(Model):
    """Required and preferred neighbours."""

    required: tuple[PodAffinityTerm, ...] | None = Field(
        default=None, alias="requiredDuringSchedulingIgnoredDuringExecution"
    )
    preferred: tuple[WeightedPodAffinityTerm, ...] | None = Field(
        default=None, alias="preferredDuringSchedulingIgnoredDuringExecution"
    )


class Affinity(Model):
    """Where pods shall be."""

    pod_affinity: PodAffinity


class PodSpec(Model):
    """The pod of a node."""

    subdomain: str | None = None
    restart_policy: Literal["Never"] | None = "Never"
    termination_grace_period_seconds: int
    priority_class_name: str | None = None
    service_account_name: str | None = None
    automount_service_account_token: bool = False
    node_selector: dict[str, str] | None = None
    affinity: Affinity | None = None
    security_context: PodSecurityContext
    tolerations: tuple[Toleration, ...] | None
    containers: tuple[Container, ...]
    volumes: tuple[Volume, ...]


class PodTemplate(Model):
    """Pods that a job makes."""

    metadata: ObjectMeta
    spec: PodSpec


class PodCondition(Model):
    """A condition of a failed pod."""

    type: Literal["DisruptionTarget"] = "DisruptionTarget"
    status: Literal["True"] = "True"


class OnExitCodes(Model):
    """Exit codes of a container."""

    container_name: str
    operator: Literal["In"] = "In"
    values: tuple[int, ...]


class PodFailureRule(Model):
    """What a Job does with a failed pod."""

    action: Literal["FailJob", "Ignore"]
    on_pod_conditions: tuple[PodCondition, ...] | None = None
    on_exit_codes: OnExitCodes | None = None


class PodFailurePolicy(Model):
    """Rules, of which the first that matches counts."""

    rules: tuple[PodFailureRule, ...]


class SuccessRule(Model):
    """Pods that decide the success of a Job, by their indices."""

    succeeded_indexes: str


class SuccessPolicy(Model):
    """When a Job has succeeded although not all of its pods have."""

    rules: tuple[SuccessRule, ...]


class JobSpec(Model):
    """A Job whose pods are the nodes of a run, in order."""

    completions: int | None = None
    parallelism: int | None = None
    completion_mode: Literal["Indexed"] | None = "Indexed"
    backoff_limit: int
    active_deadline_seconds: int | None = None
    ttl_seconds_after_finished: int | None = None
    pod_failure_policy: PodFailurePolicy
    success_policy: SuccessPolicy | None = None
    template: PodTemplate


class Job(Model):
    """A Job of Kubernetes itself."""

    api_version: Literal["batch/v1"] = "batch/v1"
    kind: Literal["Job"] = "Job"
    metadata: ObjectMeta
    spec: JobSpec

"""Jobs that operators add to Kubernetes, as far as manifests of runs use them.

Sources of names and meanings: JobSet, kubernetes-sigs/jobset `api/jobset/v1alpha2/jobset_types.go`; TrainJob and
TrainingRuntime, kubeflow/trainer `pkg/apis/trainer/v1alpha1/`; PyTorchJob, kubeflow/training-operator
`pkg/apis/kubeflow.org/v1/`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from voxtral_dist.launching.kubernetes.objects import JobSpec, Model, ObjectMeta, PodTemplate


class JobSetRule(Model):
    """What a JobSet does when one of its Jobs has failed."""

    name: str
    action: Literal["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
    on_job_failure_reasons: tuple[Literal["PodFailurePolicy", "DeadlineExceeded"], ...]
    on_job_failure_message_patterns: tuple[str, ...] | None = None


class JobSetFailurePolicy(Model):
    """Restarts of all Jobs together."""

    max_restarts: int
    restart_strategy: Literal["BlockingRecreate"] = "BlockingRecreate"
    rules: tuple[JobSetRule, ...]


class JobSetNetwork(Model):
    """Names of pods, known before they are ready."""

    enable_dns_hostnames: bool = Field(default=True, alias="enableDNSHostnames")
    subdomain: str | None = None
    publish_not_ready_addresses: bool = True


class JobTemplate(Model):
    """A Job inside a JobSet."""

    metadata: ObjectMeta | None = None
    spec: JobSpec


class ReplicatedJob(Model):
    """The one Job of our JobSets."""

    name: str
    replicas: int | None = None
    template: JobTemplate


class JobSetSpec(Model):
    """Jobs that start and restart together."""

    ttl_seconds_after_finished: int | None = None
    network: JobSetNetwork
    failure_policy: JobSetFailurePolicy
    replicated_jobs: tuple[ReplicatedJob, ...]


class JobSet(Model):
    """A JobSet."""

    api_version: Literal["jobset.x-k8s.io/v1alpha2"] = "jobset.x-k8s.io/v1alpha2"
    kind: Literal["JobSet"] = "JobSet"
    metadata: ObjectMeta
    spec: JobSetSpec


class TorchPolicy(Model):
    """Torch's variables (`PET_*`), which the runtime sets."""


class MlPolicy(Model):
    """Nodes of a TrainJob."""

    num_nodes: int
    torch: TorchPolicy = TorchPolicy()


class JobSetTemplate(Model):
    """The JobSet that a TrainJob makes."""

    spec: JobSetSpec


class TrainingRuntimeSpec(Model):
    """How TrainJobs run."""

    ml_policy: MlPolicy
    template: JobSetTemplate


class TrainingRuntime(Model):
    """A runtime of a namespace."""

    api_version: Literal["trainer.kubeflow.org/v1alpha1"] = "trainer.kubeflow.org/v1alpha1"
    kind: Literal["TrainingRuntime"] = "TrainingRuntime"
    metadata: ObjectMeta
    spec: TrainingRuntimeSpec


class RuntimeRef(Model):
    """The runtime of a TrainJob."""

    api_group: Literal["trainer.kubeflow.org"] = "trainer.kubeflow.org"
    kind: Literal["TrainingRuntime"] = "TrainingRuntime"
    name: str


class TrainerSpec(Model):
    """What a TrainJob sets in its runtime."""

    num_nodes: int
    num_proc_per_node: int


class TrainJobSpec(Model):
    """A run by a runtime."""

    active_deadline_seconds: int | None = None
    runtime_ref: RuntimeRef
    trainer: TrainerSpec


class TrainJob(Model):
    """A TrainJob of Kubeflow Trainer 2."""

    api_version: Literal["trainer.kubeflow.org/v1alpha1"] = "trainer.kubeflow.org/v1alpha1"
    kind: Literal["TrainJob"] = "TrainJob"
    metadata: ObjectMeta
    spec: TrainJobSpec


class RunPolicy(Model):
    """Limits of a PyTorchJob."""

    backoff_limit: int
    clean_pod_policy: Literal["None", "Running", "All"] = "Running"
    active_deadline_seconds: int | None = None
    ttl_seconds_after_finished: int | None = None


class ReplicaSpec(Model):
    """Pods of a PyTorchJob that are alike."""

    replicas: int
    restart_policy: Literal["ExitCode"] = "ExitCode"
    template: PodTemplate


class PyTorchReplicas(Model):
    """The first node, and the others."""

    master: ReplicaSpec = Field(alias="Master")
    worker: ReplicaSpec | None = Field(default=None, alias="Worker")


class PyTorchJobSpec(Model):
    """Nodes of a PyTorchJob."""

    run_policy: RunPolicy
    pytorch_replica_specs: PyTorchReplicas


class PyTorchJob(Model):
    """A PyTorchJob of Kubeflow Training Operator 1."""

    api_version: Literal["kubeflow.org/v1"] = "kubeflow.org/v1"
    kind: Literal["PyTorchJob"] = "PyTorchJob"
    metadata: ObjectMeta
    spec: PyTorchJobSpec

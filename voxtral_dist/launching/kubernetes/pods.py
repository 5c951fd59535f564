"""The pod of a node: its container, variables, resources and volumes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from voxtral_dist.launching.kubernetes.objects import (
    Affinity,
    Capabilities,
    ClaimSource,
    ConfigMapSource,
    Container,
    ContainerPort,
    EmptyDir,
    EnvFrom,
    EnvVar,
    EnvVarSource,
    FieldRef,
    HostPath,
    HttpGet,
    LabelSelector,
    ObjectMeta,
    PodAffinity,
    PodAffinityTerm,
    PodSecurityContext,
    PodSpec,
    PodTemplate,
    Probe,
    Resources,
    SecretKeyRef,
    SecretRef,
    SecurityContext,
    Toleration,
    Volume,
    VolumeMount,
    WeightedPodAffinityTerm,
)
from voxtral_dist.launching.kubernetes.settings import Kind, KubernetesSettings
from voxtral_dist.launching.run_facts import RunFacts, refuse_outside

# The image links `shards/` and `runs/` of its working directory to the volumes.
_DATA = ("/data", "shards", "/runs", "runs")
_RUNS = ("/runs", "runs")
# The names that each operator demands or that we choose.
CONTAINERS = {"jobset": "train", "trainjob": "node", "pytorchjob": "pytorch", "indexed-job": "train"}
# An operator of Kubeflow starts a pod again whose code is 128 or more; 138 is the one that it leaves to users.
_RESUMABLE_EXIT_CODE = "138"
# Within half an hour images are pulled and ranks have met, or ended.
_MEETING_PERIOD_SECONDS, _MEETING_PERIODS = 10, 180
# Of the p5 instances of AWS; others have fewer.
_EFA_DEVICES = 32


class PodBuilder:
    """Builds the pod of each node of a run."""

    def __init__(self, settings: KubernetesSettings, facts: RunFacts, overrides: tuple[str, ...] = ()) -> None:
        """Prepare a run with `--set` overrides, which its ranks get too.

        Raises:
            UserError: a path of the configuration is in no volume.
        """
        self._settings = settings
        self._facts = facts
        self._overrides = overrides
        refuse_outside(
            "run_dir", str(facts.run_dir), _RUNS, "add --set run_dir=/runs/NAME, because all nodes mount it."
        )
        for location in facts.local_shards:
            remedy = "the claim of the data is mounted there; give a path in it by --set, or a URL such as s3://..."
            refuse_outside("shards", location, _DATA, remedy)
        for key, folder in (("storage.cache_dir", facts.cache_dir), ("engine.nvme_dir", facts.nvme_dir)):
            if folder is not None:
                refuse_outside(key, str(folder), ("/",), f"it becomes a volume; add --set {key}=/PATH.")

    def template(self, env: tuple[EnvVar, ...], *, subdomain: str | None = None) -> PodTemplate:
        """The pod with further variables, which tell the nodes of each other."""
        settings = self._settings
        annotations = None
        if settings.queue is not None and settings.topology is not None:
            how = "required" if settings.topology_required else "preferred"
            annotations = {f"kueue.x-k8s.io/podset-{how}-topology": settings.topology}
        spec = PodSpec(
            subdomain=subdomain,
            # An operator of PyTorchJobs sets it.
            restart_policy=None if settings.kind == "pytorchjob" else "Never",
            termination_grace_period_seconds=settings.grace_seconds,
            priority_class_name=settings.priority_class,
            service_account_name=settings.service_account,
            affinity=None if settings.queue is not None else self._affinity(),
            security_context=PodSecurityContext(
                run_as_non_root=settings.user != 0,
                run_as_user=settings.user,
                run_as_group=settings.user,
                fs_group=settings.user,
            ),
            tolerations=(Toleration(key="nvidia.com/gpu"),),
            containers=(self._container(env),),
            volumes=tuple(volume for volume, _ in self._volumes()),
        )
        return PodTemplate(metadata=ObjectMeta(labels=settings.labels, annotations=annotations), spec=spec)

    def _container(self, env: tuple[EnvVar, ...]) -> Container:
        settings, port = self._settings, self._facts.prometheus_port
        args = ["--config", "/config/config.yaml"]
        for override in self._overrides:
            args += ["--set", override]
        probes = _Probes() if port is None else _probes(port, settings.kind)
        return Container(
            name=CONTAINERS[settings.kind],
            image=settings.image,
            args=tuple(args),
            ports=(ContainerPort(name="metrics", container_port=port),) if port else None,
            env=(*env, *self._env()),
            env_from=None if settings.secret is None else (EnvFrom(secret_ref=SecretRef(name=settings.secret)),),
            resources=Resources(limits=dict(self._limits())),
            startup_probe=probes.start,
            liveness_probe=probes.alive,
            readiness_probe=probes.ready,
            security_context=SecurityContext(
                capabilities=Capabilities(add=None if settings.network == "tcp" else ("IPC_LOCK",))
            ),
            volume_mounts=tuple(mount for _, mount in self._volumes()),
        )

    def _env(self) -> Iterator[EnvVar]:
        settings = self._settings
        yield EnvVar(name="PROCS_PER_NODE", value=str(settings.gpus))
        if settings.kind == "pytorchjob":
            yield EnvVar(name="RESUMABLE_EXIT_CODE", value=_RESUMABLE_EXIT_CODE)
        # A large image may still be on its way to node 0.
        yield EnvVar(name="RENDEZVOUS_TIMEOUT_SECONDS", value="1200")
        # NCCL's ranks meet by TCP whatever they send by.
        yield EnvVar(name="NCCL_SOCKET_IFNAME", value=settings.socket_interface)
        yield EnvVar(name="NCCL_DEBUG", value="WARN")
        if settings.network == "tcp":
            yield EnvVar(name="NCCL_IB_DISABLE", value="1")
        elif settings.network == "efa":
            yield EnvVar(name="FI_PROVIDER", value="efa")
            yield EnvVar(name="FI_EFA_FORK_SAFE", value="1")
        token = SecretKeyRef(name="hugging-face", key="token", optional=True)
        yield EnvVar(name="HF_TOKEN", value_from=EnvVarSource(secret_key_ref=token))

    def _limits(self) -> Iterator[tuple[str, str]]:
        settings = self._settings
        yield "cpu", settings.cpus
        yield "memory", settings.memory
        if settings.ephemeral_storage is not None:
            yield "ephemeral-storage", settings.ephemeral_storage
        yield "nvidia.com/gpu", str(settings.gpus)
        if settings.network == "rdma":
            yield settings.rdma_resource, str(settings.rdma_devices or 1)
        elif settings.network == "efa":
            yield "vpc.amazonaws.com/efa", str(settings.rdma_devices or _EFA_DEVICES)
            # libfabric's provider takes its buffers from them.
            yield "hugepages-2Mi", "5120Mi"

    def _volumes(self) -> Iterator[tuple[Volume, VolumeMount]]:
        settings, facts = self._settings, self._facts
        data, runs = settings.names_of_claims
        config = settings.config_map or f"{settings.name}-config"
        yield (
            Volume(name="config", config_map=ConfigMapSource(name=config)),
            VolumeMount(name="config", mount_path="/config", read_only=True),
        )
        if facts.local_shards:
            yield (
                Volume(name="data", persistent_volume_claim=ClaimSource(claim_name=data)),
                VolumeMount(name="data", mount_path="/data", read_only=True),
            )
        yield (
            Volume(name="runs", persistent_volume_claim=ClaimSource(claim_name=runs)),
            VolumeMount(name="runs", mount_path="/runs"),
        )
        # Downloaded weights.
        yield (
            Volume(name="hub", empty_dir=EmptyDir(size_limit=settings.hub_size)),
            VolumeMount(name="hub", mount_path="/hub"),
        )
        if facts.cache_dir is not None:
            # What torch compiles and copies of indices are there too.
            size = f"{round(1.1 * facts.cache_gigabytes) + 10}G"
            source = EmptyDir(size_limit=size) if settings.node_cache is None else None
            host = None if settings.node_cache is None else HostPath(path=settings.node_cache)
            yield (
                Volume(name="cache", empty_dir=source, host_path=host),
                VolumeMount(name="cache", mount_path=str(facts.cache_dir)),
            )
        if facts.nvme_dir is not None:
            yield (
                Volume(name="nvme", empty_dir=EmptyDir()),
                VolumeMount(name="nvme", mount_path=str(facts.nvme_dir)),
            )
        # Ranks and data workers exchange batches here; a container's default of 64 MB ends in a bus error.
        yield (
            Volume(name="shared-memory", empty_dir=EmptyDir(medium="Memory", size_limit=settings.shared_memory)),
            VolumeMount(name="shared-memory", mount_path="/dev/shm"),
        )

    def _affinity(self) -> Affinity | None:
        settings = self._settings
        if settings.topology is None:
            return None
        selector = LabelSelector(match_labels=settings.labels)
        term = PodAffinityTerm(label_selector=selector, topology_key=settings.topology)
        if settings.topology_required:
            return Affinity(pod_affinity=PodAffinity(required=(term,)))
        return Affinity(
            pod_affinity=PodAffinity(preferred=(WeightedPodAffinityTerm(weight=100, pod_affinity_term=term),))
        )


@dataclass(frozen=True)
class _Probes:
    start: Probe | None = None
    alive: Probe | None = None
    ready: Probe | None = None


def _probes(port: int, kind: Kind) -> _Probes:
    """Probes of the start, which waits until all ranks have met, and of life and readiness after it.

    A PyTorchJob's pods have names only while they are ready (Training Operator 1.9 makes services without
    `publishNotReadyAddresses`), and ranks meet by these names. So it must not wait for the meeting to be ready.
    """
    request = HttpGet(path="/alive", port=port)
    alive = Probe(http_get=request, period_seconds=30, timeout_seconds=10, failure_threshold=10)
    if kind == "pytorchjob":
        delay = _MEETING_PERIOD_SECONDS * _MEETING_PERIODS
        return _Probes(alive=alive.model_copy(update={"initial_delay_seconds": delay}))
    return _Probes(
        start=Probe(http_get=request, period_seconds=_MEETING_PERIOD_SECONDS, failure_threshold=_MEETING_PERIODS),
        alive=alive,
        ready=Probe(http_get=request, period_seconds=10, timeout_seconds=10, failure_threshold=3),
    )


def from_label(variable: str, label: str) -> EnvVar:
    """A variable with the value of a label of the pod."""
    return from_field(variable, f"metadata.labels['{label}']")


def from_field(variable: str, path: str) -> EnvVar:
    """A variable with the value of a field of the pod."""
    return EnvVar(name=variable, value_from=EnvVarSource(field_ref=FieldRef(field_path=path)))

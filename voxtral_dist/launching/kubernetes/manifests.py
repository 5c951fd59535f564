"""All manifests of a run, by the kind of its job."""

from __future__ import annotations

import yaml

from voxtral_dist.errors import UserError
from voxtral_dist.launching.exit_codes import SAVED, WOULD_FAIL_AGAIN
from voxtral_dist.launching.kubernetes.custom_objects import (
    JobSet,
    JobSetFailurePolicy,
    JobSetNetwork,
    JobSetRule,
    JobSetSpec,
    JobSetTemplate,
    JobTemplate,
    MlPolicy,
    PyTorchJob,
    PyTorchJobSpec,
    PyTorchReplicas,
    ReplicaSpec,
    ReplicatedJob,
    RunPolicy,
    RuntimeRef,
    TrainerSpec,
    TrainingRuntime,
    TrainingRuntimeSpec,
    TrainJob,
    TrainJobSpec,
)
from voxtral_dist.launching.kubernetes.objects import (
    ClaimSpec,
    ConfigMap,
    EnvVar,
    Job,
    JobSpec,
    Model,
    ObjectMeta,
    OnExitCodes,
    PersistentVolumeClaim,
    PodCondition,
    PodFailurePolicy,
    PodFailureRule,
    Service,
    ServiceSpec,
    SuccessPolicy,
    SuccessRule,
    VolumeResources,
)
from voxtral_dist.launching.kubernetes.pods import CONTAINERS, PodBuilder, from_field, from_label
from voxtral_dist.launching.kubernetes.settings import ClaimSettings, KubernetesSettings
from voxtral_dist.launching.run_facts import RunFacts

# A ConfigMap may have 1 MiB in all.
_LARGEST_CONFIG = 900_000
_REPLICATED_JOB = "node"


def manifests(
    settings: KubernetesSettings, facts: RunFacts, files: dict[str, str], overrides: tuple[str, ...] = ()
) -> list[Model]:
    """The objects of a run in the order in which they are created.

    `files`, such as config.yaml, become a ConfigMap, unless `settings.config_map` names one. `overrides` are those of
    `--set`.

    Raises:
        UserError: a path of the configuration is in no volume, or the configuration is too large.
    """
    pods = PodBuilder(settings, facts, overrides)
    found: list[Model] = []
    if settings.config_map is None:
        if sum(len(text.encode()) for text in files.values()) > _LARGEST_CONFIG:
            raise UserError("The configuration has more than 900 kB, too much for a ConfigMap: put lists into files.")
        found.append(ConfigMap(metadata=_meta(settings, "-config"), data=files))
    match settings.kind:
        case "jobset":
            found.append(_jobset(settings, pods))
        case "trainjob":
            found += _train_job(settings, pods)
        case "pytorchjob":
            found.append(_pytorch_job(settings, pods))
        case "indexed-job":
            found += _indexed_job(settings, pods)
    return found


def claims(settings: ClaimSettings) -> list[Model]:
    """The claims that the pods of `manifests` mount. They outlive runs, so they are in a file of their own."""
    sizes = ((f"{settings.name}-data", settings.data_size), (f"{settings.name}-runs", settings.runs_size))
    labels = {"app.kubernetes.io/name": "voxtral-dist"}
    return [
        PersistentVolumeClaim(
            metadata=ObjectMeta(name=name, namespace=settings.namespace, labels=labels),
            spec=ClaimSpec(
                storage_class_name=settings.storage_class, resources=VolumeResources(requests={"storage": size})
            ),
        )
        for name, size in sizes
        if size is not None
    ]


def text_of(objects: list[Model], heading: str) -> str:
    """The objects as one YAML file with a comment in front."""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in heading.splitlines())
    documents = [
        yaml.dump(one.tree(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True) for one in objects
    ]
    return comment + "---\n".join(documents)


class _Dumper(yaml.SafeDumper):
    """Lists are indented below their key, and texts of several lines are blocks."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _meta(settings: KubernetesSettings, suffix: str = "", *, queued: bool = False) -> ObjectMeta:
    labels = dict(settings.labels)
    if queued and settings.queue is not None:
        labels["kueue.x-k8s.io/queue-name"] = settings.queue
    return ObjectMeta(name=settings.name + suffix, namespace=settings.namespace, labels=labels)


def _pod_failure_policy(settings: KubernetesSettings, no_failure: str) -> PodFailurePolicy:
    """The rules of a Job: index 0 for disrupted pods, 1 for those that saved, 2 for what would fail again."""
    name = CONTAINERS[settings.kind]
    action = "Ignore" if no_failure == "Ignore" else "FailJob"
    return PodFailurePolicy(
        rules=(
            PodFailureRule(action=action, on_pod_conditions=(PodCondition(),)),
            PodFailureRule(action=action, on_exit_codes=OnExitCodes(container_name=name, values=SAVED)),
            PodFailureRule(action="FailJob", on_exit_codes=OnExitCodes(container_name=name, values=WOULD_FAIL_AGAIN)),
        )
    )


def _jobset_spec(settings: KubernetesSettings, pods: PodBuilder) -> JobSetSpec:
    """One lost rank stops all, so all pods start again together, with the same command, which resumes.

    The message of a Job that a rule of its `podFailurePolicy` fails ends with the index of the rule.
    """
    is_train_job = settings.kind == "trainjob"
    rules = [
        JobSetRule(
            name="disrupted_or_saved",
            action="RestartJobSetAndIgnoreMaxRestarts",
            on_job_failure_reasons=("PodFailurePolicy",),
            on_job_failure_message_patterns=("rule at index [01]$",),
        ),
        JobSetRule(
            name="would_fail_again",
            action="FailJobSet",
            on_job_failure_reasons=("PodFailurePolicy",),
            on_job_failure_message_patterns=("rule at index 2$",),
        ),
    ]
    deadline = None if is_train_job else settings.deadline_seconds
    if deadline is not None:
        rules.append(JobSetRule(name="deadline", action="FailJobSet", on_job_failure_reasons=("DeadlineExceeded",)))
    if is_train_job:
        env: tuple[EnvVar, ...] = ()
    else:
        env = (
            EnvVar(name="NUM_NODES", value=str(settings.nodes)),
            # JOB_COMPLETION_INDEX comes from Kubernetes by itself; these two are labels that JobSet adds.
            from_label("JOBSET_NAME", "jobset.sigs.k8s.io/jobset-name"),
            from_label("REPLICATED_JOB_NAME", "jobset.sigs.k8s.io/replicatedjob-name"),
            EnvVar(name="JOBSET_SUBDOMAIN", value=settings.name),
        )
    job = JobSpec(
        # A TrainJob sets them.
        completions=None if is_train_job else settings.nodes,
        parallelism=None if is_train_job else settings.nodes,
        # A pod that comes back alone would wait for ranks that are gone.
        backoff_limit=0,
        active_deadline_seconds=deadline,
        pod_failure_policy=_pod_failure_policy(settings, "FailJob"),
        template=pods.template(env),
    )
    meta = ObjectMeta(labels={"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}) if is_train_job else None
    return JobSetSpec(
        ttl_seconds_after_finished=settings.ttl_seconds,
        network=JobSetNetwork(subdomain=None if is_train_job else settings.name),
        # The next attempt must not write into the run while a pod of the last one still does: BlockingRecreate.
        failure_policy=JobSetFailurePolicy(max_restarts=settings.max_restarts, rules=tuple(rules)),
        # The nodes are the pods of one Job, so that JOB_COMPLETION_INDEX is the node's rank.
        replicated_jobs=(
            ReplicatedJob(name=_REPLICATED_JOB, replicas=1, template=JobTemplate(metadata=meta, spec=job)),
        ),
    )


def _jobset(settings: KubernetesSettings, pods: PodBuilder) -> JobSet:
    return JobSet(metadata=_meta(settings, queued=True), spec=_jobset_spec(settings, pods))


def _train_job(settings: KubernetesSettings, pods: PodBuilder) -> list[Model]:
    runtime = TrainingRuntime(
        metadata=_meta(settings),
        spec=TrainingRuntimeSpec(
            ml_policy=MlPolicy(num_nodes=settings.nodes), template=JobSetTemplate(spec=_jobset_spec(settings, pods))
        ),
    )
    job = TrainJob(
        metadata=_meta(settings, queued=True),
        spec=TrainJobSpec(
            active_deadline_seconds=settings.deadline_seconds,
            runtime_ref=RuntimeRef(name=settings.name),
            trainer=TrainerSpec(num_nodes=settings.nodes, num_proc_per_node=settings.gpus),
        ),
    )
    return [runtime, job]


def _pytorch_job(settings: KubernetesSettings, pods: PodBuilder) -> PyTorchJob:
    """Codes of 128 and more start a pod again, others end the job, so the entrypoint turns 75 and its like into 138."""
    template = pods.template(())
    worker = None if settings.nodes == 1 else ReplicaSpec(replicas=settings.nodes - 1, template=template)
    return PyTorchJob(
        metadata=_meta(settings, queued=True),
        spec=PyTorchJobSpec(
            run_policy=RunPolicy(
                backoff_limit=settings.max_restarts * settings.nodes,
                active_deadline_seconds=settings.deadline_seconds,
                ttl_seconds_after_finished=settings.ttl_seconds,
            ),
            pytorch_replica_specs=PyTorchReplicas(master=ReplicaSpec(replicas=1, template=template), worker=worker),
        ),
    )


def _indexed_job(settings: KubernetesSettings, pods: PodBuilder) -> list[Model]:
    """Each pod that ends is made anew, and all end when one does: a failure of a run counts once for every node.

    With a minimum of nodes, the others go on when a pod is lost, and a new one joins them. The first pod, where they
    meet, decides the success, because others may not have got a node.
    """
    service = Service(metadata=_meta(settings), spec=ServiceSpec(selector=settings.labels))
    is_elastic = settings.min_nodes is not None
    nodes = f"{settings.min_nodes}:{settings.nodes}" if is_elastic else str(settings.nodes)
    env: tuple[EnvVar, ...] = (
        EnvVar(name="NUM_NODES", value=nodes),
        # NODE_RANK is JOB_COMPLETION_INDEX, which Kubernetes sets.
        EnvVar(name="MASTER_ADDR", value=f"{settings.name}-0.{settings.name}"),
    )
    if is_elastic:
        env += (
            from_label("NODE_RANK", "batch.kubernetes.io/job-completion-index"),
            from_field("LOCAL_ADDR", "status.podIP"),
            EnvVar(name="MAX_RESTARTS", value=str(settings.max_restarts)),
        )
    spec = JobSpec(
        completions=settings.nodes,
        parallelism=settings.nodes,
        backoff_limit=settings.max_restarts * settings.nodes,
        active_deadline_seconds=settings.deadline_seconds,
        ttl_seconds_after_finished=settings.ttl_seconds,
        pod_failure_policy=_pod_failure_policy(settings, "Ignore"),
        success_policy=SuccessPolicy(rules=(SuccessRule(succeeded_indexes="0"),)) if is_elastic else None,
        template=pods.template(env, subdomain=settings.name),
    )
    return [service, Job(metadata=_meta(settings, queued=True), spec=spec)]

"""Manifests of every kind and option are valid, and say to a cluster what was asked for."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from scripts import script

KINDS = ("jobset", "trainjob", "pytorchjob", "indexed-job")
ALL_OPTIONS = shlex.split(
    "--name run-7 --namespace speech --cpus 180 --memory 1800Gi --shared-memory 200Gi --ephemeral-storage 500Gi "
    "--hub-size 50Gi --data-claim lake --runs-claim checkpoints --service-account trainer --secret s3-keys "
    "--priority-class high --topology topology.kubernetes.io/zone --deadline-seconds 86400 --max-restarts 5 "
    "--set storage.cache_dir=/nvme/cache --set metrics.prometheus_port=9400 --set engine.nvme_dir=/nvme/offload"
)
VARIANTS = {
    "tcp": ["--network", "tcp"],
    "rdma": ["--network", "rdma", "--rdma-resource", "nvidia.com/ib", "--rdma-devices", "8", "--user", "0"],
    "efa": ["--network", "efa"],
    "all": ALL_OPTIONS,
    "queue": ["--queue", "gpus", "--topology", "cloud/rack", "--topology-required", "--node-cache", "/mnt/nvme"],
    "object storage": [
        *("--set", "train_data.shards=[s3://bucket/train]", "--secret", "keys"),
        *("--set", "evaluation.test_sets={dev: {shards: 's3://bucket/dev'}}"),
    ],
}


VALIDATE = script("launch/kubernetes/validate.py")


@pytest.fixture
def manifests(launch, recipe) -> Callable[..., list[dict[str, Any]]]:
    def make(*options: str, kind: str = "jobset", nodes: int = 4) -> list[dict[str, Any]]:
        arguments = ["--config", recipe, "--kind", kind, "--nodes", nodes, "--gpus", 8, "--image", "registry/image:1"]
        result = launch("kubernetes", *arguments, "--save-seconds", 65, *options)
        assert (result.code, result.err) == (0, "")
        return list(yaml.load_all(result.out, Loader=yaml.CSafeLoader))

    return make


def pod_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The pod of the first node."""
    spec = next(one["spec"] for one in objects if one["kind"] in ("JobSet", "TrainingRuntime", "PyTorchJob", "Job"))
    if "pytorchReplicaSpecs" in spec:
        return spec["pytorchReplicaSpecs"]["Master"]["template"]
    if "replicatedJobs" in (jobset := spec["template"]["spec"] if "mlPolicy" in spec else spec):
        return jobset["replicatedJobs"][0]["template"]["spec"]["template"]
    return spec["template"]


def environment(pod: dict[str, Any]) -> dict[str, str | None]:
    return {one["name"]: one.get("value") for one in pod["spec"]["containers"][0]["env"]}


def volumes(pod: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Where each volume is mounted, and its source."""
    found = {volume.pop("name"): volume for volume in pod["spec"]["volumes"]}
    mounts = pod["spec"]["containers"][0]["volumeMounts"]
    return {mount["name"]: (mount["mountPath"], found[mount["name"]]) for mount in mounts}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_manifests_of_every_kind_and_option_are_valid(manifests, kind, variant):
    objects = manifests(*VARIANTS[variant], kind=kind)
    assert list(VALIDATE.mistakes_in_manifests("job.yaml", objects)) == []
    for one in objects:
        assert one["metadata"].get("namespace") == ("speech" if variant == "all" else None)
    pod = pod_of(objects)
    assert pod["spec"]["terminationGracePeriodSeconds"] == 300  # a minute and three saves, in whole minutes
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert environment(pod)["PROCS_PER_NODE"] == "8"
    assert volumes(pod)["shared-memory"][0] == "/dev/shm"


def test_the_schemas_that_operators_publish_accept_the_manifests(manifests):
    """What Kubeflow generates from its OpenAPI, JobSet's included; a field that it does not know is lost by it."""
    package = pytest.importorskip("kubeflow_trainer_api.models")
    published = {
        "JobSet": package.JobsetV1alpha2JobSet,
        "TrainJob": package.TrainerV1alpha1TrainJob,
        "TrainingRuntime": package.TrainerV1alpha1TrainingRuntime,
    }
    checked = []
    for kind in ("jobset", "trainjob"):
        for variant in VARIANTS.values():
            for one in manifests(*variant, kind=kind):
                if one["kind"] in published:
                    assert published[one["kind"]].from_dict(one).to_dict() == one
                    checked.append(one["kind"])
    assert set(checked) == set(published)


@pytest.mark.parametrize(
    ("network", "resource", "capabilities", "variables"),
    [
        ("tcp", None, {"drop": ["ALL"]}, {"NCCL_IB_DISABLE": "1"}),
        ("rdma", ("rdma/hca_shared_devices_a", "1"), {"drop": ["ALL"], "add": ["IPC_LOCK"]}, {}),
        ("efa", ("vpc.amazonaws.com/efa", "32"), {"drop": ["ALL"], "add": ["IPC_LOCK"]}, {"FI_PROVIDER": "efa"}),
    ],
)
def test_networks(manifests, network, resource, capabilities, variables):
    pod = pod_of(manifests("--network", network))
    container = pod["spec"]["containers"][0]
    assert container["securityContext"]["capabilities"] == capabilities
    names = {"rdma/hca_shared_devices_a", "vpc.amazonaws.com/efa"}
    limits = container["resources"]["limits"]
    assert {name: limits[name] for name in names & limits.keys()} == dict([resource] if resource else [])
    about = {name: value for name, value in environment(pod).items() if name in ("NCCL_IB_DISABLE", "FI_PROVIDER")}
    assert about == variables


def test_volumes_follow_the_configuration(manifests):
    claims = volumes(pod_of(manifests()))
    assert claims["data"] == ("/data", {"persistentVolumeClaim": {"claimName": "voxtral-data"}})
    assert claims["runs"] == ("/runs", {"persistentVolumeClaim": {"claimName": "voxtral-runs"}})
    assert "cache" not in claims

    remote = pod_of(manifests(*VARIANTS["object storage"], "--set", "storage.cache_dir=/cache"))
    assert remote["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert "data" not in volumes(remote)
    kept = volumes(pod_of(manifests("--node-cache", "/mnt/nvme", "--set", "storage.cache_dir=/cache")))
    assert kept["cache"] == ("/cache", {"hostPath": {"path": "/mnt/nvme", "type": "DirectoryOrCreate"}})
    lost = volumes(pod_of(manifests("--set", "storage.cache_dir=/cache", "--set", "storage.cache_gigabytes=200")))
    assert lost["cache"] == ("/cache", {"emptyDir": {"sizeLimit": "230G"}})


def test_the_configuration_and_own_files_go_along(manifests, recipe, tmp_path):
    objects = manifests("--set", "seed=7")
    assert objects[0]["data"] == {"config.yaml": recipe.read_text()}
    arguments = pod_of(objects)["spec"]["containers"][0]["args"]
    assert arguments == ["--config", "/config/config.yaml", "--set", "seed=7"]

    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    objects = manifests("--set", f"engine.deepspeed={tmp_path / 'ds.json'}")
    assert objects[0]["data"]["deepspeed.json"] == (tmp_path / "ds.json").read_text()
    assert pod_of(objects)["spec"]["containers"][0]["args"][-1] == "engine.deepspeed=/config/deepspeed.json"
    assert [one["kind"] for one in manifests("--config-map", "mine")] == ["JobSet"]


def test_queues_topologies_and_limits(manifests):
    queued = manifests(*VARIANTS["queue"], kind="pytorchjob")
    assert queued[-1]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert pod_of(queued)["metadata"]["annotations"] == {"kueue.x-k8s.io/podset-required-topology": "cloud/rack"}
    assert "affinity" not in pod_of(queued)["spec"]
    near = pod_of(manifests("--topology", "cloud/rack"))["spec"]["affinity"]["podAffinity"]
    assert near["preferredDuringSchedulingIgnoredDuringExecution"][0]["podAffinityTerm"]["topologyKey"] == "cloud/rack"

    jobset = manifests("--deadline-seconds", "3600", "--ttl-seconds", "60")[-1]["spec"]
    assert jobset["ttlSecondsAfterFinished"] == 60
    assert jobset["replicatedJobs"][0]["template"]["spec"]["activeDeadlineSeconds"] == 3600
    deadline = jobset["failurePolicy"]["rules"][-1]
    assert (deadline["action"], deadline["onJobFailureReasons"]) == ("FailJobSet", ["DeadlineExceeded"])
    job = manifests("--deadline-seconds", "3600", kind="trainjob")[-1]["spec"]
    assert job["activeDeadlineSeconds"] == 3600


def test_nodes_find_each_other_by_what_each_kind_offers(manifests):
    assert environment(pod_of(manifests(kind="jobset")))["NUM_NODES"] == "4"
    service, job = manifests(kind="indexed-job")[-2:]
    assert environment(pod_of([job]))["MASTER_ADDR"] == "voxtral-0.voxtral"
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"] == "voxtral"
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    # Operators of Kubeflow set the variables of the entrypoint, which NUM_NODES would hide.
    for kind in ("trainjob", "pytorchjob"):
        assert not {"NUM_NODES", "MASTER_ADDR"} & environment(pod_of(manifests(kind=kind))).keys()
    runtime, job = manifests(kind="trainjob")[-2:]
    assert job["spec"]["trainer"] == {"numNodes": 4, "numProcPerNode": 8}
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    replicas = manifests(kind="pytorchjob")[-1]["spec"]["pytorchReplicaSpecs"]
    assert {name: one["replicas"] for name, one in replicas.items()} == {"Master": 1, "Worker": 3}
    assert list(manifests(kind="pytorchjob", nodes=1)[-1]["spec"]["pytorchReplicaSpecs"]) == ["Master"]


def test_an_indexed_job_makes_pods_anew_without_counting_saved_ones(manifests):
    spec = manifests(kind="indexed-job")[-1]["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["Ignore", "Ignore", "FailJob"]
    assert [rule["onExitCodes"]["values"] for rule in rules[1:]] == [[75], [2, 3]]
    # All pods of a run end together.
    assert spec["backoffLimit"] == 20 * 4


def test_an_indexed_job_goes_on_with_the_nodes_that_are_left(manifests):
    (job,) = (one for one in manifests("--max-restarts", "5", kind="indexed-job", nodes="2:4") if one["kind"] == "Job")
    spec, variables = job["spec"], environment(pod_of([job]))
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (4, 4, 5 * 4)
    assert (variables["NUM_NODES"], variables["MASTER_ADDR"], variables["MAX_RESTARTS"]) == (
        "2:4",
        "voxtral-0.voxtral",
        "5",
    )
    fields = {one["name"]: one.get("valueFrom") for one in pod_of([job])["spec"]["containers"][0]["env"]}
    assert fields["LOCAL_ADDR"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert "job-completion-index" in fields["NODE_RANK"]["fieldRef"]["fieldPath"]
    # A pod without a node would keep the Job from its end.
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert list(VALIDATE.mistakes_in_manifests("job.yaml", [job])) == []


@pytest.mark.parametrize("kind", KINDS)
def test_probes_follow_the_port_of_the_metrics(manifests, kind):
    def probes(*options):
        container = pod_of(manifests(*options, kind=kind))["spec"]["containers"][0]
        return {name: probe for name, probe in container.items() if name.endswith("Probe")}

    assert probes() == {}
    found = probes("--set", "metrics.prometheus_port=9400")
    assert {tuple(probe["httpGet"].items()) for probe in found.values()} == {(("path", "/alive"), ("port", 9400))}
    if kind == "pytorchjob":
        # Its pods have no names before they are ready, and need these to become so.
        assert set(found) == {"livenessProbe"}
        assert found["livenessProbe"]["initialDelaySeconds"] == 1800
    else:
        assert set(found) == {"startupProbe", "livenessProbe", "readinessProbe"}
        assert found["startupProbe"]["periodSeconds"] * found["startupProbe"]["failureThreshold"] == 1800


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--nodes", "2:4"], "`--nodes MIN:MAX` is possible with `--kind indexed-job` alone"),
        (["--set", "run_dir=/scratch/run"], "`run_dir` must be below /runs or runs, but is /scratch/run instead"),
        (["--set", "run_dir=/runs/../etc"], "`run_dir` must be below /runs"),
        (["--set", "train_data.shards=[/lake/train]"], "`shards` must be below /data or shards"),
        (["--set", "storage.cache_dir=cache"], "add --set storage.cache_dir=/PATH"),
        (["--name", "Run_1"], "`--name` must be up to 40 lower-case letters"),
        (["--memory", "lots"], "`--memory` must be a quantity of Kubernetes"),
        (["--kind", "trainjob", "--ttl-seconds", "60"], "`--ttl-seconds` is not possible with a TrainJob"),
        (["--topology-required"], "needs `--topology`"),
        (["--max-restarts", "-1"], "`--max-restarts`"),
    ],
)
def test_mistakes_are_refused(launch, recipe, options, sentence):
    arguments = ["--config", recipe, "--nodes", 2, "--gpus", 8, "--image", "i", "--save-seconds", 65]
    assert sentence in launch("kubernetes", *arguments, *options).refusal()

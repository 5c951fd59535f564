#!/usr/bin/env python3
"""Check Kubernetes manifests without a cluster: `validate.py [FILE ...]`, by default all of this folder.

Kubernetes' own objects are checked against its schema, unknown fields included. JobSets, TrainJobs and PyTorchJobs are
not part of Kubernetes: their outer part is checked against `schema/`, the Jobs and pods inside as Jobs and pods, and
what has to agree between the two and `docker/entrypoint` is compared. Prints one line per mistake and exits with 1 if
there is one.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

HERE = Path(__file__).resolve().parent
SCHEMAS = {
    "JobSet": HERE / "schema" / "jobset-v1alpha2.json",
    "TrainJob": HERE / "schema" / "trainjob-v1alpha1.json",
    "TrainingRuntime": HERE / "schema" / "trainingruntime-v1alpha1.json",
    "PyTorchJob": HERE / "schema" / "pytorchjob-v1.json",
}
# The oldest version that the manifests are written for: `podFailurePolicy` is stable from here on.
KUBERNETES_VERSION = "1.31"


def mistakes_in_file(path: Path) -> Iterator[str]:
    """One sentence per mistake in the manifests of `path`."""
    try:
        manifests = [
            manifest for manifest in yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader) if manifest is not None
        ]
    except (OSError, yaml.YAMLError) as error:
        yield f"{path}: must be a readable YAML file, but {' '.join(str(error).split())}"
        return
    yield from mistakes_in_manifests(path, manifests)


def mistakes_in_manifests(path: Path | str, manifests: list[Any]) -> Iterator[str]:
    """One sentence per mistake in what was read from `path`."""
    if not manifests:
        yield f"{path}: must hold at least one manifest, but is empty"
    for manifest in manifests:
        if not isinstance(manifest, dict) or not {"apiVersion", "kind"} <= manifest.keys():
            yield f"{path}: every manifest must be a mapping with apiVersion and kind"
            continue
        check = CHECKS.get(manifest["kind"], mistakes_in_kubernetes_object)
        name = (manifest.get("metadata") or {}).get("name", "without a name")
        yield from (f"{path}: {manifest['kind']} {name}: {mistake}" for mistake in check(manifest))


def mistakes_in_kubernetes_object(manifest: dict[str, Any]) -> Iterator[str]:
    """The first mistake that the schema reports, if any."""
    try:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{_dotted(error.absolute_path)}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        yield error.message


def mistakes_in_outer_part(manifest: dict[str, Any]) -> list[str]:
    """Mistakes by the schema of its kind."""
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMAS[manifest["kind"]].read_text()))
    return [f"{_dotted(error.absolute_path)}: {error.message}" for error in validator.iter_errors(manifest)]


def mistakes_in_training_runtime(runtime: dict[str, Any]) -> Iterator[str]:
    """Mistakes of the runtime itself; if it has none, those of its JobSet, whose nodes the TrainJob counts."""
    if mistakes := mistakes_in_outer_part(runtime):
        yield from mistakes
        return
    spec = runtime["spec"]["template"]["spec"]
    jobset = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": runtime["metadata"], "spec": spec}
    yield from mistakes_in_jobset(jobset, is_counted=False)


def mistakes_in_pytorch_job(job: dict[str, Any]) -> Iterator[str]:
    """Mistakes of the PyTorchJob itself; if it has none, those of its pods."""
    if mistakes := mistakes_in_outer_part(job):
        yield from mistakes
        return
    for name, replicas in job["spec"]["pytorchReplicaSpecs"].items():
        where = f"spec.pytorchReplicaSpecs.{name}.template"
        template = replicas["template"]
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {**template.get("metadata", {}), "name": job["metadata"]["name"]}
        yield from (f"{where}: {mistake}" for mistake in mistakes_in_kubernetes_object(pod))
        # The operator looks for it by name.
        if [container["name"] for container in template["spec"]["containers"]] != ["pytorch"]:
            yield f"{where}: spec.containers: must be one container with the name pytorch"


def mistakes_in_jobset(jobset: dict[str, Any], *, is_counted: bool = True) -> Iterator[str]:
    """Mistakes of the JobSet itself; if it has none, those of its Jobs.

    `is_counted`: whether it says how many nodes there are, which that of a runtime does not.
    """
    if mistakes := mistakes_in_outer_part(jobset):
        yield from mistakes
        return
    for index, replicated_job in enumerate(jobset["spec"]["replicatedJobs"]):
        where = f"spec.replicatedJobs.{index}.template"
        template = replicated_job["template"]
        # The JobSet's own metadata has Kubernetes' form too, so it is checked on the way.
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": jobset["metadata"], **template}
        mistakes = list(mistakes_in_kubernetes_object(job))
        if is_counted and not mistakes:
            mistakes = list(disagreements(jobset, replicated_job))
        yield from (f"{where}: {mistake}" for mistake in mistakes)
    yield from unmatched_rules(jobset["spec"])


def unmatched_rules(spec: dict[str, Any]) -> Iterator[str]:
    """Rules of the two failure policies that do not meet: such a failure would count as any other one.

    A Job that a rule of its `podFailurePolicy` fails has a message that ends with `rule at index N`.
    """
    rules = spec.get("failurePolicy", {}).get("rules", [])
    patterns = [pattern for rule in rules for pattern in rule.get("onJobFailureMessagePatterns", [])]
    jobs = [replicated_job["template"]["spec"] for replicated_job in spec["replicatedJobs"]]
    numbers = [len(job.get("podFailurePolicy", {}).get("rules", [])) for job in jobs]
    ends = [f"matching FailJob rule at index {index}" for index in range(max(numbers))]
    for pattern in patterns:
        if not any(re.search(pattern, end) for end in ends):
            yield f"spec.failurePolicy: the pattern {pattern!r} matches no rule of a podFailurePolicy"
    if patterns:
        for index, end in enumerate(ends):
            if not any(re.search(pattern, end) for pattern in patterns):
                yield f"spec.failurePolicy: no pattern matches the rule at index {index} of a podFailurePolicy"


def disagreements(jobset: dict[str, Any], replicated_job: dict[str, Any]) -> Iterator[str]:
    """Values that are repeated and differ: each would make a run wait for ranks that never start."""
    job = replicated_job["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    environment = {variable["name"]: variable.get("value") for variable in container.get("env", [])}
    num_nodes = job.get("completions")
    gpus = container.get("resources", {}).get("limits", {}).get("nvidia.com/gpu")
    subdomain = jobset["spec"].get("network", {}).get("subdomain", jobset["metadata"]["name"])
    for name, value, expected, source in [
        ("replicas", replicated_job.get("replicas", 1), 1, "the nodes being the pods of one Job"),
        ("parallelism", job.get("parallelism"), num_nodes, "completions"),
        ("completionMode", job.get("completionMode"), "Indexed", "JOB_COMPLETION_INDEX being the node's rank"),
        ("NUM_NODES", environment.get("NUM_NODES"), str(num_nodes), "completions"),
        ("PROCS_PER_NODE", environment.get("PROCS_PER_NODE", str(gpus)), str(gpus), "nvidia.com/gpu"),
        ("JOBSET_SUBDOMAIN", environment.get("JOBSET_SUBDOMAIN"), subdomain, "network.subdomain"),
    ]:
        if value != expected:
            yield f"`{name}` must be {expected!r}, because of {source}, but is {value!r} instead"


def _dotted(path: Any) -> str:
    return ".".join(str(part) for part in path) or "(top)"


CHECKS: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "JobSet": mistakes_in_jobset,
    "TrainJob": lambda manifest: iter(mistakes_in_outer_part(manifest)),
    "TrainingRuntime": mistakes_in_training_runtime,
    "PyTorchJob": mistakes_in_pytorch_job,
}


def main(arguments: list[str]) -> int:
    """Check the files named, or all of this folder; 1 if there is a mistake."""
    paths = [Path(argument) for argument in arguments] or sorted(HERE.glob("*.yaml"))
    mistakes = [mistake for path in paths for mistake in mistakes_in_file(path)]
    print("\n".join(mistakes) if mistakes else f"{len(paths)} files are valid for Kubernetes {KUBERNETES_VERSION}")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`launch/kubernetes/validate.py` accepts our manifests and refuses each with one mistake in it."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import script

FOLDER = Path(__file__).resolve().parent.parent / "launch" / "kubernetes"
mistakes_in_file = script("launch/kubernetes/validate.py").mistakes_in_file


def validate(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "validate.py"), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_our_manifests_are_valid():
    result = validate()
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("5 files are valid")


@pytest.mark.parametrize(
    ("file", "right", "wrong", "sentence"),
    [
        # The outer part: our subset of JobSet's schema.
        ("jobset.yaml", "maxRestarts:", "maxRestart:", "spec.failurePolicy: Additional properties are not allowed"),
        ("jobset.yaml", "subdomain: voxtral", "subdomains: voxtral", "spec.network: Additional properties"),
        ("jobset.yaml", "BlockingRecreate", "Blocking", "spec.failurePolicy.restartStrategy: 'Blocking' is not one of"),
        # The Job, the pod and the container inside: Kubernetes' schema.
        ("jobset.yaml", "completionMode:", "completionsMode:", "template: spec: Additional properties"),
        ("jobset.yaml", "fsGroup: 10001", "fsGroups: 10001", "spec.template.spec.securityContext: Additional"),
        ("jobset.yaml", "mountPath: /runs", "path: /runs", "spec.template.spec.containers.0.volumeMounts.2"),
        ("jobset.yaml", "value: '8'", "value: 8", "containers.0.env.4.value: 8 is not of type"),
        ("jobset.yaml", "\n  labels:", "\n  label:", "metadata: Additional properties"),
        ("storage.yaml", "accessModes:", "accessMode:", "PersistentVolumeClaim voxtral-data: spec: Additional"),
        # What has to agree.
        ("jobset.yaml", "parallelism: 2", "parallelism: 1", "`parallelism` must be 2, because of completions"),
        ("jobset.yaml", "value: '2'", "value: '3'", "`NUM_NODES` must be '2', because of completions, but is '3'"),
        ("jobset.yaml", "gpu: '8'", "gpu: '4'", "`PROCS_PER_NODE` must be '4', because of nvidia.com/gpu"),
        ("jobset.yaml", "subdomain: voxtral", "subdomain: other", "`JOBSET_SUBDOMAIN` must be 'other'"),
        ("jobset.yaml", "index 2$", "index 3$", "the pattern 'rule at index 3$' matches no rule of a podFailurePolicy"),
        ("jobset.yaml", "index [01]$", "index 0$", "no pattern matches the rule at index 1 of a podFailurePolicy"),
        ("jobset.yaml", "- 75", "- '75'", "onExitCodes.values.0: '75' is not of type"),
        # Jobs of other operators.
        ("trainjob.yaml", "numNodes:", "nodes:", "TrainingRuntime voxtral: spec.mlPolicy: Additional properties"),
        (
            "trainjob.yaml",
            "backoffLimit:",
            "backoffs:",
            "TrainingRuntime voxtral: spec.replicatedJobs.0.template: spec",
        ),
        ("trainjob.yaml", "runtimeRef:", "runtime:", "TrainJob voxtral: spec: Additional properties"),
        ("pytorchjob.yaml", "Worker:", "Workers:", "spec.pytorchReplicaSpecs: Additional properties are not allowed"),
        ("pytorchjob.yaml", "name: pytorch", "name: train", "must be one container with the name pytorch"),
        ("pytorchjob.yaml", "mountPath: /runs", "path: /runs", "Master.template: spec.containers.0.volumeMounts.2"),
        ("indexed-job.yaml", "clusterIP:", "clusterIp:", "Service voxtral: spec: Additional properties"),
        # Not a manifest at all.
        ("storage.yaml", "kind: PersistentVolumeClaim", "", "must be a mapping with apiVersion and kind"),
        ("storage.yaml", "metadata:", "metadata: [", "must be a readable YAML file"),
    ],
)
def test_a_manifest_with_a_mistake_is_refused(tmp_path, file, right, wrong, sentence):
    text = (FOLDER / file).read_text()
    assert right in text
    broken = tmp_path / file
    broken.write_text(text.replace(right, wrong, 1))
    assert any(sentence in mistake for mistake in mistakes_in_file(broken))


def test_mistakes_are_printed_and_end_with_1(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    result = validate(tmp_path / "empty.yaml", FOLDER / "storage.yaml")
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout == f"{tmp_path / 'empty.yaml'}: must hold at least one manifest, but is empty\n"

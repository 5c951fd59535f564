"""What a JobSet of `launch/kubernetes/jobset.yaml` does when its pods end, played through by the documented rules.

Rules of Kubernetes' Job controller (https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy)
and of JobSet (https://jobset.sigs.k8s.io/docs/tasks/failure_policy/, keps/262-ConfigurableFailurePolicy), which are not
at hand in a test. The message of a failed Job is that of kubernetes/pkg/controller/job/pod_failure_policy.go.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

MANIFEST = Path(__file__).resolve().parent.parent / "launch" / "kubernetes" / "jobset.yaml"
SAVED = 75


@dataclass(frozen=True)
class Pod:
    """The end of a pod: the exit code of its container, and whether Kubernetes took its node away."""

    code: int
    is_disrupted: bool = False


@dataclass
class Played:
    """A JobSet after some attempts."""

    state: str = "running"
    restarts: int = 0
    counted: int = 0


def job_failure(job: dict[str, Any], pods: Sequence[Pod]) -> tuple[str, str] | None:
    """Reason and message of a Job's failure; None if all of its pods succeeded.

    Of each failed pod the first rule that matches counts. FailJob of any pod fails the Job; else failed pods are
    counted against `backoffLimit`.
    """
    failed = [(index, pod) for index, pod in enumerate(pods) if pod.code != 0]
    for index, pod in failed:
        for number, rule in enumerate(job["podFailurePolicy"]["rules"]):
            if _rule_matches(rule, pod):
                assert rule["action"] == "FailJob", "the only action that is simulated"
                what = f"Container train for pod default/voxtral-node-0-{index} failed with exit code {pod.code}"
                if "onPodConditions" in rule:
                    what = f"Pod default/voxtral-node-0-{index} has condition DisruptionTarget"
                return "PodFailurePolicy", f"{what} matching FailJob rule at index {number}"
    if len(failed) > job["backoffLimit"]:
        return "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    return None


def _rule_matches(rule: dict[str, Any], pod: Pod) -> bool:
    if "onPodConditions" in rule:
        return pod.is_disrupted and any(one["type"] == "DisruptionTarget" for one in rule["onPodConditions"])
    codes = rule["onExitCodes"]
    assert (codes["operator"], codes["containerName"]) == ("In", "train")
    return pod.code in codes["values"]


def action(policy: dict[str, Any], reason: str, message: str) -> str:
    """The action of the first rule whose reasons and patterns match; without one, `RestartJobSet`."""
    for rule in policy["rules"]:
        reasons, patterns = rule.get("onJobFailureReasons"), rule.get("onJobFailureMessagePatterns")
        if (not reasons or reason in reasons) and (not patterns or any(re.search(one, message) for one in patterns)):
            return str(rule["action"])
    return "RestartJobSet"


def play(spec: dict[str, Any], attempts: Sequence[Sequence[Pod]]) -> Played:
    """The JobSet after its pods have ended in these ways, one attempt after the other."""
    policy, job = spec["failurePolicy"], spec["replicatedJobs"][0]["template"]["spec"]
    played = Played()
    for pods in attempts:
        assert played.state == "running", "a JobSet that has ended starts no pods"
        failure = job_failure(job, pods)
        if failure is None:
            played.state = "completed"
            continue
        counts = (chosen := action(policy, *failure)) == "RestartJobSet"
        if chosen == "FailJobSet" or (counts and played.counted >= policy["maxRestarts"]):
            played.state = "failed"
            continue
        played.restarts += 1
        played.counted += counts
    return played


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(MANIFEST.read_text())["spec"]
    return found


FINISHED = [Pod(0), Pod(0)]


@pytest.mark.parametrize(
    "pods",
    [
        # One node is drained: its pod and the one of the other node save.
        [Pod(SAVED, is_disrupted=True), Pod(SAVED)],
        [Pod(SAVED), Pod(SAVED, is_disrupted=True)],
        # The end of `max_run_hours`, or a pod that Kubernetes has seen to end before its node's condition.
        [Pod(SAVED), Pod(SAVED)],
        [Pod(0), Pod(SAVED)],
        # A node that is gone, with a pod that lost its peer.
        [Pod(137, is_disrupted=True), Pod(76)],
        [Pod(76), Pod(137, is_disrupted=True)],
    ],
    ids=str,
)
def test_what_is_no_failure_restarts_without_counting(spec, pods):
    often = spec["failurePolicy"]["maxRestarts"] + 5
    assert play(spec, [*often * [pods], FINISHED]) == Played("completed", restarts=often, counted=0)


@pytest.mark.parametrize("code", [2, 3])
@pytest.mark.parametrize("other", [0, 1, 2, 3, 143])
def test_what_would_fail_again_ends_the_jobset_at_once(spec, code, other):
    assert play(spec, [[Pod(other), Pod(code)]]) == Played("failed", restarts=0, counted=0)
    assert play(spec, [[Pod(code), Pod(other)]]) == Played("failed", restarts=0, counted=0)


@pytest.mark.parametrize("code", [1, 74, 76, 77, 134, 137, 139, 143, 247])
def test_other_failures_count(spec, code):
    most = spec["failurePolicy"]["maxRestarts"]
    lost = [Pod(code), Pod(76)]
    assert play(spec, most * [lost]) == Played("running", restarts=most, counted=most)
    assert play(spec, [*most * [lost], lost]) == Played("failed", restarts=most, counted=most)
    assert play(spec, [lost, [Pod(SAVED), Pod(SAVED)], FINISHED]) == Played("completed", restarts=2, counted=1)


def test_pods_that_finish_complete_the_jobset(spec):
    assert play(spec, [FINISHED]) == Played("completed")

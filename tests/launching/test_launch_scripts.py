"""Scripts of `launch slurm` and `launch local` run for real, with a scheduler and ranks that play a part."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
LIMIT_SECONDS = 30
# Ends with the next code of the list, or waits for a signal and saves.
PART = """#!/bin/bash
echo "$@" >>started
code=$(head -n 1 codes) && sed -i 1d codes
if [[ $code == wait ]]; then
    trap 'echo signalled >>started; exit 75' USR1 TERM
    touch waits
    while true; do sleep 0.05; done
fi
exit "${code:-0}"
"""


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def start(tmp_path):
    """Starts a script in a folder whose ranks end with these codes."""
    put(tmp_path / "bin" / "srun", PART)
    put(tmp_path / "docker" / "entrypoint", PART)
    put(tmp_path / "bin" / "scontrol", '#!/bin/bash\necho "$@" >>requeued\n')
    put(tmp_path / "bin" / "sleep", '#!/bin/bash\n[[ $1 == 10 ]] || exec /bin/sleep "$1"\n')

    def make(script: str, *codes: int | str) -> subprocess.Popen[bytes]:
        put(tmp_path / "script", script)
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        variables = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        return subprocess.Popen([tmp_path / "script"], cwd=tmp_path, env=variables)

    return make


@pytest.fixture
def slurm(launch, recipe):
    def make(*options: str) -> str:
        arguments = ["--config", recipe, "--nodes", 2, "--gpus", 8, "--save-seconds", 65]
        result = launch("slurm", *arguments, *options)
        assert (result.code, result.err) == (0, "")
        return result.out

    return make


@pytest.mark.parametrize(
    ("code", "seen", "requeues"), [(0, 0, 0), (75, 0, 1), (2, 2, 0), (3, 3, 0), (1, 0, 1), (76, 0, 1), (137, 0, 1)]
)
def test_a_job_queues_itself_again_by_its_exit_code(start, slurm, tmp_path, code, seen, requeues):
    assert start(slurm(), code).wait(LIMIT_SECONDS) == seen
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == "requeue 7\n" * requeues
    failures = list(tmp_path.glob("*.failures"))
    assert bool(failures) == (code in (1, 76, 137))


def test_failures_are_counted_over_attempts_and_saved_ones_are_not(start, slurm, tmp_path):
    script = slurm("--max-restarts", "2")
    seen = [start(script, code).wait(LIMIT_SECONDS) for code in (77, 75, 1, 75, 76)]
    assert seen == [0, 0, 0, 0, 76]
    lines = (tmp_path / "voxtral-7.failures").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["77", "1", "76"]


@pytest.mark.parametrize(("number", "seen", "is_requeued"), [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 75, False)])
def test_a_signal_reaches_the_ranks_and_only_the_end_of_time_queues_again(
    start, slurm, tmp_path, number, seen, is_requeued
):
    """Slurm itself queues a preempted job again, and must not find a cancelled one there."""
    job = start(slurm(), "wait")
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (tmp_path / "waits").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(number)
    assert job.wait(LIMIT_SECONDS) == seen
    assert "signalled" in (tmp_path / "started").read_text()
    assert (tmp_path / "requeued").exists() == is_requeued


def test_options_become_those_of_sbatch(slurm, recipe):
    given = "--partition gpu --account lab --qos high --time 2-00:00:00 --cpus 96 --socket-interface ib0 --set seed=3"
    lines = slurm(*given.split()).splitlines()
    expected = {
        *("--partition=gpu", "--account=lab", "--qos=high", "--time=2-00:00:00", "--cpus-per-task=96", "--nodes=2"),
        *("--gpus-per-node=8", "--ntasks-per-node=1", "--requeue", "--signal=B:USR1@300"),
    }
    assert {f"#SBATCH {option}" for option in expected} <= set(lines)
    assert "export NCCL_SOCKET_IFNAME=ib0" in lines
    assert [line.strip() for line in lines if "--config" in line or "--set" in line] == [
        f"--config {recipe} \\",
        "--set seed=3 &",
    ]


def test_a_job_may_begin_with_fewer_nodes(launch, recipe):
    result = launch("slurm", "--config", recipe, "--nodes", "2:4", "--gpus", 8, "--save-seconds", 65)
    assert "#SBATCH --nodes=2-4\n" in result.out
    wrong = launch("slurm", "--config", recipe, "--nodes", "4:2", "--gpus", 8)
    assert wrong.code == 2
    assert "must be MIN:MAX with MIN no larger than MAX, but is 4:2 instead" in wrong.err


@pytest.mark.parametrize("container", ["pyxis", "enroot", "apptainer"])
def test_a_container_sees_the_configuration_and_is_told_the_first_node(slurm, recipe, container):
    script = slurm("--container", container, "--image", "image.sqsh", "--mounts", "/lustre/runs:/runs")
    assert f"{recipe.parent}:/config" in script
    assert "/usr/local/bin/voxtral-entrypoint \\\n    --config /config/run.yaml &" in script
    assert script.index("export MASTER_ADDR") < script.index("\nsrun ")


@pytest.mark.parametrize(
    "options", [["--venv", "my venv", "--set", "model.path=my model"], ["--container", "pyxis", "--image", "i"]]
)
def test_scripts_pass_shellcheck(slurm, tmp_path, options):
    put(tmp_path / "script", slurm(*options))
    checked = subprocess.run([SHELLCHECK, tmp_path / "script"], capture_output=True, text=True, check=False)
    assert (checked.stdout, checked.returncode) == ("", 0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--container", "pyxis"], "`--container` and `--image` belong together"),
        (["--container", "pyxis", "--image", "i", "--venv", "v"], "exclude each other"),
        (["--time", "tomorrow"], "`--time` must be a time of Slurm"),
        (["--partition", "a b"], "`--partition` must be one word"),
    ],
)
def test_mistakes_are_refused(launch, recipe, options, sentence):
    arguments = ["--config", recipe, "--nodes", 2, "--gpus", 8, "--save-seconds", 65]
    assert sentence in launch("slurm", *arguments, *options).refusal()


@pytest.fixture
def local(launch, recipe) -> str:
    result = launch("local", "--config", recipe, "--gpus", 2, "--max-restarts", 2, "--set", "seed=3")
    assert (result.code, result.err) == (0, "")
    return str(result.out)


@pytest.mark.parametrize(
    ("codes", "seen"),
    [([0], 0), ([75, 75, 75, 75, 0], 0), ([2], 2), ([1, 75, 76, 0], 0), ([1, 76, 77], 77), ([1, 3], 3)],
)
def test_a_local_run_starts_again_by_its_exit_code(start, local, recipe, tmp_path, codes, seen):
    assert start(local, *codes).wait(LIMIT_SECONDS) == seen
    assert (tmp_path / "started").read_text() == f"--config {recipe} --set seed=3\n" * len(codes)


def test_a_stopped_local_run_ends(start, local, tmp_path):
    run = start(local, "wait", 0)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (tmp_path / "waits").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    assert run.wait(LIMIT_SECONDS) == 75
    assert (tmp_path / "codes").read_text() == "0\n"


def test_a_local_script_passes_shellcheck(local, tmp_path):
    put(tmp_path / "script", local)
    checked = subprocess.run([SHELLCHECK, tmp_path / "script"], capture_output=True, text=True, check=False)
    assert (checked.stdout, checked.returncode) == ("", 0)

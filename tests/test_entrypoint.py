"""`docker/entrypoint` runs for real; two "nodes" are two processes, or two network namespaces, of this machine."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from schedulers import SCHEDULERS

REPOSITORY = Path(__file__).resolve().parent.parent
ENTRYPOINT = REPOSITORY / "docker" / "entrypoint"
LIMIT_SECONDS = 120

# What a rank does in these tests instead of training.
MEET = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(total)
seen = {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "local_rank": os.environ["LOCAL_RANK"],
        "sum": total.item(), "arguments": sys.argv[1:]}
Path(os.environ["SEEN_DIR"], f"rank-{dist.get_rank()}.json").write_text(json.dumps(seen))
dist.destroy_process_group()
"""
WAIT_FOR_STOP = """
import os, signal, sys, time
from pathlib import Path

here = Path(os.environ["SEEN_DIR"])

def stop(*_):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    (here / f"stopped-{os.environ['RANK']}").touch()
    # As in training, where the ranks agree on a step: the launcher kills the others when the first one ends.
    while not all((here / f"stopped-{rank}").exists() for rank in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.05)
    sys.exit(75)

signal.signal(signal.SIGUSR1, stop)
(here / f"started-{os.environ['RANK']}").write_text(str(os.getpid()))
time.sleep(600)
"""


def environment(script: Path | None = None, **variables: str) -> dict[str, str]:
    """The variables of a fresh container, without those of a scheduler that this test may run under."""
    of_schedulers = re.compile(
        r"SLURM_|JOBSET_|JOB_COMPLETION|REPLICATED_JOB|MASTER_|NODE_RANK|NUM_NODES|CUDA_VISIBLE|PET_|SKYPILOT_|DSTACK_|"
        r"OMPI_|PMI_|RANK|WORLD_SIZE|LOCAL_RANK|RAY_|KUBERAY_|VC_|AWS_BATCH|AZUREML_"
    )
    inherited = {name: value for name, value in os.environ.items() if not of_schedulers.match(name)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    defaults = {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PROCS_PER_NODE": "1"}
    return inherited | defaults | {"VOXTRAL_TRAIN_SCRIPT": str(script or __file__)} | variables


def dry_run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ENTRYPOINT), *(arguments or ("--config", "c.yaml"))],
        env=environment(**{"ENTRYPOINT_DRY_RUN": "1"} | variables),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


def launched(*arguments: str, **variables: str) -> dict[str, Any]:
    """The launcher's options as a dry run prints them, with `world_info` decoded."""
    result = dry_run(*arguments, **variables)
    assert result.returncode == 0, result.stderr
    options: dict[str, Any] = dict(re.findall(r"--(\w+)=(\S+)", result.stdout))
    options["world_info"] = json.loads(base64.urlsafe_b64decode(options["world_info"]))
    return options


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def run_two_nodes(tmp_path: Path, prefixes: list[list[str]], **variables: str) -> None:
    """Start both nodes and compare what their ranks saw; `prefixes` are the commands that each node runs under."""
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    nodes = [
        subprocess.Popen(
            [*prefix, str(ENTRYPOINT), "--config", "c.yaml", "--set", "name=two words"],
            env=environment(script, NUM_NODES="2", NODE_RANK=str(rank), SEEN_DIR=str(tmp_path), **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, prefix in enumerate(prefixes)
    ]
    try:
        outputs = [node.communicate(timeout=LIMIT_SECONDS)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    for rank in range(2):
        assert json.loads((tmp_path / f"rank-{rank}.json").read_text()) == {
            "rank": rank,
            "world_size": 2,
            "local_rank": "0",
            "sum": 3,
            "arguments": ["--config", "c.yaml", "--set", "name=two words"],
        }


def test_two_nodes_meet(tmp_path):
    run_two_nodes(tmp_path, [[], []], MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())


@contextmanager
def node_of_two_ranks(folder: Path, program: str) -> Iterator[subprocess.Popen[bytes]]:
    """A node whose ranks run a program that leaves files in a folder."""
    script = folder / "wait.py"
    script.write_text(program)
    node = subprocess.Popen(
        [str(ENTRYPOINT), "--config", "c.yaml"],
        env=environment(script, PROCS_PER_NODE="2", SEEN_DIR=str(folder)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield node
    finally:
        node.kill()


def test_sigterm_lets_every_rank_save_and_ends_with_their_code(tmp_path):
    with node_of_two_ranks(tmp_path, WAIT_FOR_STOP) as node:
        started = [tmp_path / f"started-{rank}" for rank in range(2)]
        wait_for(lambda: all(path.exists() and path.read_text() for path in started))
        node.send_signal(signal.SIGTERM)
        assert node.wait(timeout=LIMIT_SECONDS) == 75
        assert all((tmp_path / f"stopped-{rank}").exists() for rank in range(2))
        for path in started:
            with pytest.raises(ProcessLookupError):
                os.kill(int(path.read_text()), 0)


# A rank that imports libraries for a while before it listens to signals.
WAIT_LATER = "import time\ntime.sleep(2)\n" + WAIT_FOR_STOP


def test_sigterm_before_the_ranks_listen_is_remembered(tmp_path):
    with node_of_two_ranks(tmp_path, WAIT_LATER) as node:
        # The launcher runs, and has not started any rank yet.
        wait_for(lambda: "deepspeed.launcher.launch" in "".join(map(command_of, children_of(node.pid))))
        node.send_signal(signal.SIGTERM)
        assert node.wait(timeout=LIMIT_SECONDS) == 75
        assert all((tmp_path / f"stopped-{rank}").exists() for rank in range(2))


def children_of(process_id: int) -> list[str]:
    return Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()


def command_of(process_id: str) -> str:
    try:
        return Path(f"/proc/{process_id}/cmdline").read_text()
    except OSError:
        return ""


def test_sigterm_while_a_node_waits_for_the_first_one_ends_it(tmp_path):
    waiting = TWO_NODES | {"MASTER_ADDR": "nobody.invalid", "RENDEZVOUS_TIMEOUT_SECONDS": "60"}
    node = subprocess.Popen(
        [str(ENTRYPOINT), "--config", "c.yaml"], env=environment(**waiting), stderr=subprocess.PIPE, text=True
    )
    try:
        assert node.stderr is not None
        assert "waiting up to 60 s" in node.stderr.readline()
        node.send_signal(signal.SIGTERM)
        assert node.wait(timeout=20) == 75
        assert "stopped by a signal before the ranks were started" in node.stderr.read()
    finally:
        node.kill()


def test_other_commands_run_as_they_are():
    result = dry_run("printf", "%s", "two words")
    assert (result.returncode, result.stdout) == (0, "two words")


def test_doctor_is_started_on_ranks_as_training_is():
    result = dry_run("doctor", "--config", "c.yaml", PROCS_PER_NODE="2")
    assert result.returncode == 0, result.stderr
    assert f"--no_local_rank {REPOSITORY}/launch/doctor.py --config c.yaml" in result.stdout


def test_help_names_every_variable():
    text = dry_run("--help").stdout
    assert {"NUM_NODES", "PROCS_PER_NODE", "RENDEZVOUS_TIMEOUT_SECONDS", "VOXTRAL_TRAIN_SCRIPT"} <= set(
        re.findall(r"[A-Z_]+", text)
    )


def test_a_single_node_needs_no_variables():
    options = launched(PROCS_PER_NODE="2")
    assert options["world_info"] == {"node-0": ["0", "1"]}
    assert (options["node_rank"], options["master_addr"]) == ("0", "127.0.0.1")


def test_gpus_are_those_of_the_scheduler():
    options = launched(CUDA_VISIBLE_DEVICES="5,GPU-1a,7", PROCS_PER_NODE="2")
    assert options["world_info"] == {"node-0": ["5", "GPU-1a"]}


JOBSET = {"JOBSET_NAME": "run", "REPLICATED_JOB_NAME": "node", "JOB_COMPLETION_INDEX": "2", "NUM_NODES": "3"}


@pytest.mark.parametrize("subdomain", [None, "voices"])
def test_jobset(subdomain):
    options = launched(**JOBSET, **({"JOBSET_SUBDOMAIN": subdomain} if subdomain else {}))
    assert list(options["world_info"]) == ["node-0", "node-1", "node-2"]
    assert options["node_rank"] == "2"
    assert options["master_addr"] == f"run-node-0-0.{subdomain or 'run'}"


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The variables of node 1 of 2, and a `scontrol` that knows only this list of nodes."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] || { echo "Invalid hostlist" >&2; exit 1; }\n'
        "printf 'gpu07\\ngpu08\\n'\n"
    )
    scontrol.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        "PATH": path,
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "1230042",
    }


def test_slurm(slurm):
    options = launched(**slurm)
    assert list(options["world_info"]) == ["node-0", "node-1"]
    assert (options["node_rank"], options["master_addr"], options["master_port"]) == ("1", "gpu07", "20042")


def test_explicit_variables_win_over_slurm(slurm):
    options = launched(**slurm, MASTER_ADDR="10.0.0.7", MASTER_PORT="4000")
    assert (options["node_rank"], options["master_addr"], options["master_port"]) == ("1", "10.0.0.7", "4000")


ADDRESSES = ("first", "10.0.0.2", "10.0.0.3")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler):
    variables = SCHEDULERS[scheduler](2, ADDRESSES)
    options = launched(**variables)
    assert list(options["world_info"]) == ["node-0", "node-1", "node-2"]
    assert (options["node_rank"], options["master_addr"]) == ("2", "first")
    assert options["master_port"] == variables.get("PET_MASTER_PORT", variables.get("MASTER_PORT", "29500"))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_one_node_of_a_scheduler_may_be_a_run_of_its_own(scheduler):
    options = launched(**SCHEDULERS[scheduler](2, ADDRESSES) | {"NUM_NODES": "1", "MASTER_ADDR": ""})
    assert (list(options["world_info"]), options["node_rank"]) == (["node-0"], "0")


@pytest.mark.parametrize(
    "variables",
    [
        {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1"},
        {"PET_NNODES": "1", "PET_NODE_RANK": "0"},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost"},
        {"PMI_SIZE": "1", "AWS_BATCH_JOB_NUM_NODES": "1"},
    ],
)
def test_a_scheduler_with_a_single_node(variables):
    assert list(launched(**variables)["world_info"]) == ["node-0"]


@pytest.mark.parametrize(
    "variables",
    [
        {"JOB_COMPLETION_INDEX": "0"},
        {"JOB_COMPLETION_INDEX": "1"},
        {"NODE_RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
        {"AWS_BATCH_JOB_NUM_NODES": "4"},
        {"AZUREML_NODE_COUNT": "2"},
        {"VC_TASK_INDEX": "0"},
        {"RAY_JOB_ID": "02000000"},
        {"RAY_ADDRESS": "10.0.0.1:6379"},
        {"PET_RDZV_ENDPOINT": "first:29400"},
    ],
    ids=str,
)
def test_nodes_that_nobody_counts_never_train_alone(variables):
    result = dry_run(**variables)
    assert (result.returncode, result.stdout) == (2, "")
    name, value = next(iter(variables.items()))
    assert result.stderr.startswith(f"entrypoint: NUM_NODES must be set, because {name} ('{value}') tells of several")
    assert result.stderr.count("\n") == 1


TWO_NODES = {"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-0"}


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (TWO_NODES | {"NODE_RANK": "one"}, "NODE_RANK must be a whole number from 0 to 1, but is 'one' instead"),
        (TWO_NODES | {"NODE_RANK": "2"}, "NODE_RANK must be a whole number from 0 to 1, but is '2' instead"),
        (TWO_NODES | {"NODE_RANK": ""}, "NODE_RANK must be a whole number from 0 to 1, but is 'unset' instead"),
        (TWO_NODES | {"NUM_NODES": "0"}, "NUM_NODES must be a whole number from 1 to 100000, but is '0' instead"),
        (TWO_NODES | {"MASTER_ADDR": ""}, "MASTER_ADDR must be set for 2 nodes"),
        (TWO_NODES | {"MASTER_PORT": "99999"}, "MASTER_PORT must be a whole number from 1 to 65535"),
        (TWO_NODES | {"PROCS_PER_NODE": "-1"}, "PROCS_PER_NODE must be a whole number from 1 to 1024"),
        ({"CUDA_VISIBLE_DEVICES": "0", "PROCS_PER_NODE": "2"}, "PROCS_PER_NODE must be at most 1"),
        ({"VOXTRAL_TRAIN_SCRIPT": "/nowhere.py"}, "the training script must exist, but /nowhere.py does not"),
        (JOBSET | {"NUM_NODES": ""}, "NUM_NODES must be set under a JobSet"),
        (JOBSET | {"JOB_COMPLETION_INDEX": ""}, "JOB_COMPLETION_INDEX must be set under a JobSet"),
        (JOBSET | {"REPLICATED_JOB_NAME": ""}, "REPLICATED_JOB_NAME must be set under a JobSet"),
        ({"PET_NNODES": "2:4"}, "PET_NNODES must be a whole number, but is '2:4' instead"),
        ({"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}, "MASTER_ADDR must be set for 2 nodes"),
        ({"SKYPILOT_NUM_NODES": "2"}, "NODE_RANK must be a whole number from 0 to 1, but is 'unset' instead"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "MASTER_ADDR must be set for 2 nodes"),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "Open MPI must start one process per node"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, "one process per node must start this, but LOCAL_RANK"),
        ({"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_LOCALID": "3"}, "Slurm must start one task per node"),
    ],
)
def test_wrong_values_are_refused_in_one_sentence(variables, sentence):
    result = dry_run(**variables)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"entrypoint: {sentence}")
    assert result.stderr.count("\n") == 1


def test_an_unknown_slurm_host_is_refused_in_one_sentence(slurm):
    result = dry_run(**slurm | {"SLURM_JOB_NODELIST": "other[1-2]"})
    assert result.returncode == 2
    assert "'scontrol show hostnames other[1-2]' failed (Invalid hostlist); set MASTER_ADDR" in result.stderr
    assert result.stderr.count("\n") == 1


def test_node_rank_0_that_never_appears_ends_the_wait():
    result = dry_run(
        **TWO_NODES | {"MASTER_ADDR": "nobody.invalid"}, ENTRYPOINT_DRY_RUN="0", RENDEZVOUS_TIMEOUT_SECONDS="1"
    )
    assert result.returncode == 1
    sentence = result.stderr.splitlines()[-1]
    assert "'nobody.invalid', did not resolve within 1 s on node rank 1" in sentence
    assert "raise RENDEZVOUS_TIMEOUT_SECONDS" in sentence


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two connected network namespaces, in which the name `first-node` resolves to the address of the first one."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"voxtral-test-{os.getpid()}-{rank}" for rank in range(2)]
    cable = [f"vx{os.getpid()}n{rank}" for rank in range(2)]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", cable[0], "netns", names[0], "type", "veth", "peer", "name", cable[1], "netns", names[1])
            for rank, (name, end) in enumerate(zip(names, cable, strict=True)):
                ip("-n", name, "address", "add", f"10.77.0.{rank + 1}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no network namespaces: {error.stderr.strip()}")
        for rank, name in enumerate(names):
            # `ip netns exec` mounts this file as /etc/hosts. The host's own name must resolve too, because gloo listens
            # on its address.
            hosts = Path("/etc/netns", name, "hosts")
            hosts.parent.mkdir(parents=True)
            own_address = f"10.77.0.{rank + 1} {socket.gethostname()}"
            hosts.write_text(f"127.0.0.1 localhost\n10.77.0.1 first-node\n{own_address}\n")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


@pytest.mark.slow
def test_two_nodes_meet_over_a_network(tmp_path, namespaces):
    """The nodes share only a network: the second one finds the first one by name."""
    prefixes = [["ip", "netns", "exec", name] for name in namespaces]
    run_two_nodes(tmp_path, prefixes, MASTER_ADDR="first-node", MASTER_PORT="29500")


def test_a_range_of_nodes_is_a_run_of_torchrun():
    result = dry_run(NUM_NODES="2:4", MASTER_ADDR="first", MASTER_PORT="4000", NODE_RANK="1", PROCS_PER_NODE="8")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[:4] == ["python", "-u", "-m", "torch.distributed.run"]
    options = dict(re.findall(r"--([\w-]+)=(\S+)", result.stdout))
    assert (options["nnodes"], options["nproc-per-node"], options["max-restarts"]) == ("2:4", "8", "20")
    assert options["rdzv-endpoint"] == "first:4000"
    assert options["rdzv-conf"].endswith("is_host=0")
    assert result.stdout.split()[-2:] == ["--config", "c.yaml"]


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"NUM_NODES": "4:2", "MASTER_ADDR": "first"}, "NUM_NODES (its maximum) must be a whole number from 4 "),
        ({"NUM_NODES": "x:2", "MASTER_ADDR": "first"}, "NUM_NODES (its minimum) must be a whole number from 1 "),
        ({"NUM_NODES": "2:4"}, "MASTER_ADDR must be set for NUM_NODES=2:4, but is missing; "),
        ({"NUM_NODES": "2:4", "MASTER_ADDR": "first", "MAX_RESTARTS": "-1"}, "MAX_RESTARTS must be a whole number "),
        (
            {"NUM_NODES": "2:4", "MASTER_ADDR": "first", "NODE_RANK": "4"},
            "NODE_RANK must be a whole number from 0 to 3",
        ),
    ],
)
def test_a_range_of_nodes_is_checked(variables, sentence):
    result = dry_run(**variables)
    assert result.returncode == 2
    assert sentence in result.stderr


# Ranks that save and end together when one of them is asked to; with a single node they finish.
STOP_TOGETHER = """
import os, signal, sys, time
from pathlib import Path

here, size = Path(os.environ["SEEN_DIR"]), os.environ["WORLD_SIZE"]
signal.signal(signal.SIGUSR1, lambda *_: (here / "stop").touch())
(here / f"started-{size}-{os.environ['GROUP_RANK']}").touch()
if size == "1":
    sys.exit(0)
while not (here / "stop").exists():
    time.sleep(0.05)
sys.exit(75)
"""


@pytest.mark.slow
def test_a_node_that_is_stopped_leaves_and_the_other_one_goes_on(tmp_path):
    script = tmp_path / "stop.py"
    script.write_text(STOP_TOGETHER)
    variables = {"NUM_NODES": "1:2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "SEEN_DIR": str(tmp_path)}
    nodes = [
        subprocess.Popen(
            [str(ENTRYPOINT), "--config", "c.yaml"],
            env=environment(script, NODE_RANK=str(rank), LOCAL_ADDR="127.0.0.1", **variables),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        wait_for(lambda: len(list(tmp_path.glob("started-2-*"))) == 2)
        nodes[1].send_signal(signal.SIGTERM)
        assert nodes[1].wait(timeout=LIMIT_SECONDS) == 75
        assert nodes[0].wait(timeout=LIMIT_SECONDS) == 0
    finally:
        for node in nodes:
            node.kill()
    assert (tmp_path / "started-1-0").exists()


@pytest.mark.parametrize(
    ("code", "seen"), [(0, 0), (1, 138), (2, 2), (3, 3), (74, 138), (75, 138), (77, 138), (247, 247)]
)
def test_codes_after_which_a_run_resumes_can_be_one_that_a_scheduler_restarts_on(tmp_path, code, seen):
    (tmp_path / "python").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "python").chmod(0o755)
    variables = environment(NUM_NODES="1", RESUMABLE_EXIT_CODE="138")
    variables["PATH"] = f"{tmp_path}{os.pathsep}{variables['PATH']}"
    command = [str(ENTRYPOINT), "--config", "c.yaml"]
    assert subprocess.run(command, env=variables, timeout=LIMIT_SECONDS, check=False).returncode == seen

"""A report on this machine, and the build of DeepSpeed's extensions before a run has to wait for it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.distributed.distributed_c10d import _get_default_store

from voxtral_dist.config import RunConfig
from voxtral_dist.diagnosis.clocks import seconds_ahead
from voxtral_dist.diagnosis.facts import RankFacts, rank_facts
from voxtral_dist.diagnosis.findings import HostFindings, Problem, problems
from voxtral_dist.diagnosis.folders import Speed, folder_speed, shard_speed
from voxtral_dist.diagnosis.links import measure_links
from voxtral_dist.diagnosis.report import report_lines
from voxtral_dist.distributed.collectives import from_first_rank, gather_on_first, wait_for_all
from voxtral_dist.distributed.devices import refuse_unsupported_gpu
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.compilation import has_python_header, missing_for_compilation
from voxtral_dist.engine.zero.extensions import (
    Extension,
    extension_locks,
    needed_extensions,
    old_locks,
    refuse_without_nvme_support,
)
from voxtral_dist.errors import UserError
from voxtral_dist.model.precision import refuse_without_bfloat16
from voxtral_dist.output.console import say
from voxtral_dist.output.counting import counted
from voxtral_dist.training.run_checks import refuse_unshared
from voxtral_dist.training.same_run import find_differences

_PACKAGES = ("torch", "deepspeed", "transformers", "mistral-common", "webdataset", "soundfile", "jiwer")
_LOAD = (
    "from voxtral_dist.engine.zero.extensions import needed_extensions\n"
    "for extension in needed_extensions({}, {}): extension.load()"
)


def examine(build_timeout: int, with_offload: bool, with_nvme: bool) -> int:
    """Print versions and hardware, and build DeepSpeed's extensions.

    Args:
        build_timeout: limit for the build, in seconds.
        with_offload: build the extension for offloading the optimizer too.
        with_nvme: build the extensions for offloading to NVMe too.

    Returns:
        The exit code: 0 if runs can start on this machine, else 2.
    """
    for package in _PACKAGES:
        say(f"{package} {importlib.metadata.version(package)}")
    devices = f"{counted(os.cpu_count() or 1, 'core')}, {counted(torch.cuda.device_count(), 'GPU')}"
    say(f"Python {sys.version.split()[0]}, {devices}")
    if not _can_compute():
        return 2
    _report_triton()
    extensions = needed_extensions(with_offload, with_nvme)
    compiled = [one for one in extensions if not one.is_prebuilt]
    _report_extensions(extensions, compiled)
    if compiled and not (shutil.which("c++") and has_python_header()):
        say("DeepSpeed's extensions need a C++ compiler and Python.h (Debian: apt install g++ python3-dev).")
        return 2
    try:
        if with_nvme:
            refuse_without_nvme_support()
    except UserError as error:
        say(error)
        return 2
    return _load(build_timeout, with_offload, with_nvme) if extensions else 0


def examine_hosts(config: RunConfig, megabytes: int, world: World) -> int:
    """Print what is wrong with the hosts of a run, and a table of them. All ranks call it together.

    Args:
        config: of the run; its folders and shards are measured.
        megabytes: written to each folder by each host, and contributed to an all-gather by each rank.
        world: all ranks.

    Returns:
        The exit code, on all ranks: 0 if nothing is wrong, else 2.

    Raises:
        UserError: a part of the configuration cannot be read.
    """
    facts = gather_on_first(rank_facts(config, world.rank, world.size, world.device), world)
    hosts = from_first_rank(_ranks_by_host(facts), world)
    differences = find_differences(config, (), world)
    firsts = [ranks[0] for ranks in hosts]
    is_first_on_host = world.rank in firsts
    ahead = 0.0
    if is_first_on_host and world.size > 1:
        ahead = seconds_ahead(_get_default_store(), world.rank, firsts[1:])
    wait_for_all(world)
    speeds = dict(_speeds(config, megabytes << 20)) if is_first_on_host else {}
    unshared = list(_unshared(config, world))
    measured = gather_on_first((ahead, speeds), world)
    links = measure_links(hosts, megabytes << 20, world)
    code = 0
    if world.is_first:
        found = [HostFindings(tuple(facts[rank] for rank in ranks), *measured[ranks[0]]) for ranks in hosts]
        # Ranks of a host mostly differ alike.
        different = dict.fromkeys(
            Problem(one.host, f"{one.key} is {one.here}, but {one.on_first} on rank 0") for one in differences
        )
        wrong = [*unshared, *different, *problems(found, links)]
        for line in report_lines(found, links, wrong):
            say(line)
        code = 2 if wrong else 0
    return from_first_rank(code, world)


def _ranks_by_host(facts: Sequence[RankFacts]) -> list[list[int]]:
    """The ranks of each host, in their order."""
    hosts: dict[str, list[int]] = {}
    for one in facts:
        hosts.setdefault(one.host, []).append(one.rank)
    return list(hosts.values())


def _speeds(config: RunConfig, num_bytes: int) -> Iterator[tuple[str, Speed]]:
    yield "`run_dir`", folder_speed(config.run_dir, num_bytes)
    for name, folder in {
        "`storage.cache_dir`": config.storage.cache_dir,
        "`engine.nvme_dir`": config.engine.nvme_dir,
        "temporary files": Path(tempfile.gettempdir()),
    }.items():
        if folder is not None:
            yield name, folder_speed(folder, num_bytes)
    yield "shards", shard_speed(config.train_data.shards, config.storage)


def _unshared(config: RunConfig, world: World) -> Iterator[Problem]:
    try:
        refuse_unshared(config.run_dir, world)
    except UserError as error:
        yield Problem(None, str(error))


def _can_compute() -> bool:
    """Say what the GPUs lack; false if torch cannot compute on one at all."""
    float16 = "set `model.precision: float16`, and decode with `--precision float16`"
    for device in (torch.device("cuda", number) for number in range(torch.cuda.device_count())):
        try:
            refuse_unsupported_gpu(device)
        except UserError as error:
            say(error)
            return False
        try:
            refuse_without_bfloat16("bfloat16", device, float16)
        except UserError as error:
            say(error)
    return True


def _report_triton() -> None:
    """Say what torch.compile lacks on GPUs: Triton compiles C at its first use. Other runs do not need it."""
    missing = missing_for_compilation(torch.device("cuda", 0)) if torch.cuda.device_count() else None
    if missing is not None:
        say(
            f"torch.compile is not possible, because {missing}: `model.compile_blocks: auto` compiles nothing, and "
            "`evaluation.static_cache` and `optimizer.algorithm: muon` fail."
        )


def _report_extensions(extensions: Sequence[Extension], compiled: Sequence[Extension]) -> None:
    prebuilt = [one.name for one in extensions if one not in compiled]
    if prebuilt:
        say(f"DeepSpeed was installed with {', '.join(prebuilt)}.")
    if compiled:
        say(f"DeepSpeed compiles {', '.join(one.name for one in compiled)} on this machine.")
    if not extensions:
        say("Runs on GPUs without offload use none of DeepSpeed's extensions.")


def _load(timeout: int, with_offload: bool, with_nvme: bool) -> int:
    """Load or build in a separate process group, so that a timeout ends the compilers too."""
    for lock, age in old_locks():
        say(f"Removed the lock {lock}, {counted(age / 60, 'minute', '.0f')} old, which a killed build left behind.")
        lock.unlink(missing_ok=True)
    say(f"Loading DeepSpeed's extensions (limit for builds: {timeout} s; cached afterwards) ...")
    command = [sys.executable, "-c", _LOAD.format(with_offload, with_nvme)]
    # Use the ninja that runs in this environment find: another version would rebuild everything.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    builder = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        output, _ = builder.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(builder.pid, signal.SIGKILL)
        for lock in extension_locks():
            lock.unlink(missing_ok=True)
        say(f"The build took longer than {timeout} s: raise --build-timeout, or look for what slows this machine.")
        return 2
    if builder.returncode != 0:
        say(f"The build failed:\n{output.decode(errors='replace')[-4000:]}")
        return 2
    say("DeepSpeed's extensions are ready.")
    return 0

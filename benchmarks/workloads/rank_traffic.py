"""Bytes that the ranks of a real run send each other, as the kernel counts them in a network of their own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

from voxtral_dist.config import RunConfig

from workloads.gloo_ranks import join_ranks, run_ranks
from workloads.rank_memory import examples_of

NUM_EXAMPLES, NUM_TARGETS = 1, 8
# ZeRO-3 learns the order of modules in the first step.
_FIRST_STEPS, _COUNTED_STEPS = 2, 2
_TIMEOUT_SECONDS = 300
_PRELOADED = ("voxtral_dist.train", "deepspeed", "voxtral_dist.engine.fsdp2.engine")
_NEW_USERS, _NEW_NETWORK = 0x10000000, 0x40000000


def enter_private_network() -> bool:
    """Move this process, which must have one thread, into a network with nothing but a loopback interface.

    False where the system does not allow it: then its loopback interface is shared with other processes.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_NEW_NETWORK) != 0:
        if libc.unshare(_NEW_USERS | _NEW_NETWORK) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="ascii")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    return True


def sent_bytes(config: RunConfig, num_ranks: int, num_micro_batches: int) -> float:
    """Bytes that a rank sends in a step of so many micro-batches, mean over ranks and some steps."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (num_ranks, Path(folder), config, num_micro_batches)
        run_ranks(num_ranks, _train, *arguments, preloaded=_PRELOADED, limit_seconds=_TIMEOUT_SECONDS)
        counted = int((Path(folder) / "counted").read_text(encoding="ascii"))
    return counted / num_ranks / _COUNTED_STEPS


def _train(rank: int, num_ranks: int, folder: Path, config: RunConfig, num_micro_batches: int) -> None:
    """Run some steps on one rank, by the engine and update of a run; the first rank counts."""
    import torch.distributed as dist

    from voxtral_dist.data.examples.micro_batch import collate
    from voxtral_dist.data.loader import StepBatches
    from voxtral_dist.engine.build import build_engine
    from voxtral_dist.model.features import LogMel
    from voxtral_dist.model.prompts import VoxtralPrompts
    from voxtral_dist.train import build_train_step

    world = join_ranks(rank, num_ranks, folder)
    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    batch = collate(examples_of(prompts, NUM_EXAMPLES, NUM_TARGETS), prompts)
    log_mel = LogMel.from_pretrained(config.model.path, world.device)
    # All micro-batches have the same windows, so the blocks of the encoder run once.
    train_step = build_train_step(config, build_engine(config, log_mel, world, NUM_EXAMPLES), world)
    counted = 0
    for step in range(_FIRST_STEPS + _COUNTED_STEPS):
        dist.barrier()
        before = _sent_over_loopback()
        dist.barrier()
        train_step.run(StepBatches(step, [batch] * num_micro_batches))
        dist.barrier()
        counted += _sent_over_loopback() - before if step >= _FIRST_STEPS else 0
    if world.is_first:
        (folder / "counted").write_text(str(counted), encoding="ascii")
    dist.barrier()
    # Threads of gloo may abort a process that ends in the usual way.
    os._exit(0)


def _sent_over_loopback() -> int:
    lines = Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()
    (loopback,) = (line.split(":")[1].split() for line in lines if line.split(":")[0].strip() == "lo")
    return int(loopback[8])

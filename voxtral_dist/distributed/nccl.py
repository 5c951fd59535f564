"""Limits of NCCL's watchdog, and what it has found wrong."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from torch.distributed import distributed_c10d

# After a collective has failed, torch's watchdog waits four times this, by default a minute, and aborts the process. In
# that time the failure watch finds out who is gone, which torch's message does not tell.
_DUMP_MILLISECONDS = 3000


def set_watchdog_limits(timeout: timedelta) -> None:
    """Let torch's watchdog of NCCL end this process for a peer that is gone, unless the user has set how.

    A watchdog that hangs itself, in a call of CUDA, is ended by its heartbeat monitor after at most three times its
    limit: see `ProcessGroupNCCL.cpp`, `HeartbeatMonitor::runLoop`. Call it before the first process group is made.

    Args:
        timeout: limit of collectives.
    """
    for name, value in {
        # End the process without cleaning up, because ncclCommAbort may hang.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": 3,
        "TORCH_NCCL_ENABLE_MONITORING": 1,
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": max(1, round(timeout.total_seconds() / 3)),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": 1,
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": _DUMP_MILLISECONDS,
    }.items():
        os.environ.setdefault(name, str(value))


def failed_collective() -> str | None:
    """What torch's watchdog has found wrong in a process group of NCCL, such as "timeout"; None without such a group.

    The thread that waits for the collective does not learn it: it waits for a kernel.
    """
    for group, (backend, _store) in list(distributed_c10d._world.pg_map.items()):
        if "nccl" in backend:
            name: str = group._get_backend(torch.device("cuda")).get_error().name
            if name != "SUCCESS":
                return name.lower().replace("_", " ")
    return None

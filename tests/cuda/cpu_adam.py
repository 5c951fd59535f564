"""torch's AdamW in place of DeepSpeed's for CPUs, an extension that takes minutes to build."""

from __future__ import annotations

from typing import Any

import torch

from fake_streams import StreamLog


class CpuAdam(torch.optim.AdamW):
    """Takes what DeepSpeed's takes.

    log: of the streams; latest_calls: the last call before each update.
    """

    log = StreamLog()
    latest_calls: list[str]

    def __init__(self, groups: Any, adamw_mode: bool, **arguments: Any) -> None:
        super().__init__(groups, **arguments)
        CpuAdam.latest_calls = []

    def step(self, closure: Any = None) -> Any:
        self.latest_calls.append(self.log.latest)
        return super().step(closure)


def install_cpu_adam(log: StreamLog) -> None:
    """Make engines of this process use it, for good."""
    from deepspeed.runtime.zero import utils as zero_utils

    from voxtral_dist.engine.zero import optimizers

    optimizers.DeepSpeedCPUAdam = CpuAdam  # type: ignore[attr-defined]
    zero_utils.ZERO_SUPPORTED_OPTIMIZERS.append(CpuAdam)
    CpuAdam.log = log

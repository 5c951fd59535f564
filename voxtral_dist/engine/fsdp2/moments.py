"""The moments of sharded parameters under both optimizers: as tensors by name on disk, and set from float32 values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from voxtral_dist.engine.fsdp2.block_states import SCALE, dequantize, quantize
from voxtral_dist.engine.fsdp2.dcp_files import read_partitions, stored_moments
from voxtral_dist.engine.fsdp2.low_memory_adamw import LowMemoryAdamW, zero_moments
from voxtral_dist.engine.fsdp2.sharding import local_part


class ShardedMoments:
    """The moments of trained parameters, which the optimizer holds."""

    def __init__(self, optimizer: torch.optim.AdamW | LowMemoryAdamW, trained: Mapping[str, nn.Parameter]) -> None:
        """Keep references to both."""
        self._optimizer = optimizer
        self._trained = trained

    def of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Sharded tensors by name on disk, which share memory with the optimizer's; zeros before the first update."""
        state = self._optimizer.state.get(parameter)
        if not state:
            return zero_moments(parameter, is_quantized=False)
        return {key: one for key, one in state.items() if key != "step"}

    def set_zero(self, num_updates: int) -> None:
        """Set all moments to zero, and the number of updates."""
        for parameter in self._trained.values():
            zeros = zero_moments(parameter, is_quantized=self._is_quantized(parameter))
            self._optimizer.state[parameter] = {"step": self._count(parameter, num_updates), **zeros}

    def set_rows(self, parameter: nn.Parameter, rows: Mapping[str, Tensor]) -> None:
        """Copy this rank's rows of float32 moments."""
        own = quantize(rows) if self._is_quantized(parameter) else rows
        for key, moment in self.of(parameter).items():
            local_part(moment).copy_(own[key])

    def skip(self, num_updates: int) -> None:
        """Lower the number of updates by those that were skipped."""
        for state in self._optimizer.state.values():
            state["step"] -= num_updates

    def read(self, folder: Path, stored: list[str]) -> None:
        """Read the moments of `write_partitions`, whichever of the two optimizers wrote them; all ranks together.

        Args:
            folder: that was written.
            stored: names of all tensors in it.
        """
        alike: dict[str, Tensor] = {}
        for name, keys in stored_moments(self._trained, stored).items():
            parameter = self._trained[name]
            own = self.of(parameter)
            if set(keys) == own.keys():
                alike |= {f"{name}//{key}": one for key, one in own.items()}
            else:
                self._convert(name, parameter, folder)
        read_partitions(alike, folder)

    def _convert(self, name: str, parameter: nn.Parameter, folder: Path) -> None:
        """Read moments that are quantized on disk and not here, or the other way around."""
        others = zero_moments(parameter, is_quantized=not self._is_quantized(parameter))
        read_partitions({f"{name}//{key}": one for key, one in others.items()}, folder)
        self.set_rows(parameter, dequantize({key: local_part(one) for key, one in others.items()}))

    def _is_quantized(self, parameter: nn.Parameter) -> bool:
        return any(key.endswith(SCALE) for key in self._optimizer.state.get(parameter, ()))

    def _count(self, parameter: nn.Parameter, num_updates: int) -> Tensor | int:
        if isinstance(self._optimizer, LowMemoryAdamW):
            return num_updates
        return torch.tensor(float(num_updates), device=local_part(parameter).device)

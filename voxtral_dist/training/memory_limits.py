"""Micro-batches that did not fit into the memory of a GPU, and how those of their size are divided afterwards.

Under FSDP2, ZeRO-2 and ZeRO-3 ranks exchange weights and gradients in the middle of a forward or backward pass. A rank
whose memory runs out there cannot leave the pass, because the others wait for its part in the exchanges that follow,
and NCCL has no way to call them back. So the run ends on all ranks, within seconds, with the code on which launchers
start it again, and goes on from its checkpoint with smaller parts. All ranks know the largest size of each micro-batch
before they compute with it, so they divide alike, without another exchange.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch
import xxhash
from pydantic import TypeAdapter

from voxtral_dist.config import RunConfig
from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.distributed.collectives import from_first_rank
from voxtral_dist.distributed.world import World, out_of_memory_reason
from voxtral_dist.errors import RetryError
from voxtral_dist.files import write_errors_named
from voxtral_dist.output.counting import counted

# In `run_dir`, a line for each time that memory ran out.
LIMITS_FILE = "out_of_memory.jsonl"
# A micro-batch with almost as many positions will not fit either.
_MARGIN = 0.9


@dataclass(frozen=True)
class Exceeded:
    """A micro-batch that did not fit.

    setting: a hash of what else memory depends on. rank, at_step: where, and in which step from 1. num_examples,
    num_positions: its size, padding included.
    """

    setting: str
    rank: int
    at_step: int
    num_examples: int
    num_positions: int


class MemoryLimits:
    """Divides micro-batches that would not fit, on all ranks alike."""

    def __init__(self, config: RunConfig, world: World, exceeded: Iterable[Exceeded] = ()) -> None:
        """Divide micro-batches as large as those in `exceeded` that did not fit with the same configuration."""
        self._path = config.run_dir / LIMITS_FILE
        self._setting = _setting(config, world)
        self._world = world
        self.exceeded = [one for one in exceeded if one.setting == self._setting]
        self._fitting = _MARGIN * min((one.num_positions for one in self.exceeded), default=math.inf)

    @classmethod
    def read(cls, config: RunConfig, world: World) -> MemoryLimits:
        """The limits that earlier processes of the run have met. All ranks call it together."""
        path = config.run_dir / LIMITS_FILE
        lines = path.read_bytes().splitlines() if world.is_first and path.is_file() else []
        return cls(config, world, from_first_rank([one for line in lines for one in _exceeded(line)], world))

    def num_parts(self, num_examples: int, num_positions: int) -> int:
        """Into how many parts to divide a micro-batch.

        Args:
            num_examples: the most examples that a rank has in it.
            num_positions: the most positions, padding included.
        """
        num_parts = 1
        while (
            num_parts < num_examples and num_positions * -(-num_examples // num_parts) >= self._fitting * num_examples
        ):
            num_parts *= 2
        return num_parts

    def learn(self, batch: MicroBatch, step: int, error: torch.OutOfMemoryError) -> None:
        """Remember that a micro-batch of this rank did not fit; do nothing if it cannot be divided.

        Raises:
            RetryError: the run can go on with smaller parts, in other processes.
            WriteError: `run_dir` cannot be written.
        """
        num_examples, num_positions = batch.input_ids.shape[0], batch.input_ids.numel()
        if num_examples == 1:
            return
        exceeded = Exceeded(self._setting, self._world.rank, step + 1, num_examples, num_positions)
        with write_errors_named("The size that did not fit", self._path), self._path.open("a") as file:
            file.write(json.dumps(asdict(exceeded)) + "\n")
        raise RetryError(
            f"Rank {self._world.rank} ran out of GPU memory in step {step + 1} ({out_of_memory_reason(error)}), with "
            f"{counted(num_examples, 'example')} of {counted(num_positions, 'position')}. From the next start on, "
            "micro-batches of this size are divided in two on all ranks: rerun the same command to resume. Smaller "
            "ones with more `train_data.slots_per_step` would take no restart; `voxtral-dist plan` estimates what "
            "fits."
        ) from error

    def __str__(self) -> str:
        last = self.exceeded[-1]
        return (
            f"Micro-batches of {counted(math.ceil(self._fitting), 'position')} or more are divided, because rank "
            f"{last.rank} ran out of memory at step {last.at_step}: remove {self._path} to try them whole again."
        )


def _exceeded(line: bytes) -> Iterator[Exceeded]:
    """What a line of the file holds; nothing if it is damaged, because that must not keep a run from starting."""
    with suppress(ValueError, TypeError):
        yield TypeAdapter(Exceeded).validate_json(line)


def _setting(config: RunConfig, world: World) -> str:
    """A hash of what the memory of a micro-batch depends on besides its size."""
    parts = [one.model_dump_json() for one in (config.model, config.trainable, config.optimizer, config.engine)]
    return xxhash.xxh3_64_hexdigest("\n".join([*parts, str(world.size)]).encode())

"""What all ranks tell each other during a step, in one exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from voxtral_dist.distributed.collectives import RankRows
from voxtral_dist.distributed.devices import peak_memory_bytes
from voxtral_dist.distributed.world import World
from voxtral_dist.training.requests import Requests
from voxtral_dist.training.step_facts import StepFacts

_NUM_REQUESTS = len(Requests().row())


@dataclass(frozen=True)
class Told:
    """What all ranks know after an exchange, the same on each.

    loss_sum: over the targets of all ranks. requests: those of any rank. waiting_seconds, memory_gigabytes: maxima over
    ranks of the wait for data and of the peak memory. upcoming: the next step; None at the end of the run.
    """

    loss_sum: float
    requests: Requests
    waiting_seconds: float
    memory_gigabytes: float
    upcoming: StepFacts | None


class StepExchange:
    """An exchange that begins behind the last backward pass, and is read when the gradient's norm is waited for anyway.

    The host's own numbers travel with the loss: an exchange of their own at the start of a step would wait for the
    update before it, and the device then for the host.
    """

    def __init__(
        self,
        losses: Sequence[Tensor],
        requests: Requests,
        waiting_seconds: float,
        upcoming: StepFacts | None,
        world: World,
    ) -> None:
        """Begin the exchange.

        Args:
            losses: sums over the targets of this rank's micro-batches, on the device.
            requests: of this rank.
            waiting_seconds: for which this rank waited for its data.
            upcoming: this rank's next step; None on all ranks at the end of the run.
            world: all ranks.
        """
        measured = [waiting_seconds, float(peak_memory_bytes(world.device))]
        row = [*requests.row(), *measured, *(upcoming.row() if upcoming else [])]
        self._rows = RankRows(row, world, computed=torch.stack(list(losses)).sum())

    @cached_property
    def told(self) -> Told:
        """What was exchanged; the first access waits for the device."""
        losses, *columns = zip(*self._rows.read(), strict=True)
        requests, others = columns[:_NUM_REQUESTS], columns[_NUM_REQUESTS:]
        waiting_seconds, memory_bytes, *upcoming = others
        return Told(
            loss_sum=sum(losses),
            requests=Requests.over_ranks(list(zip(*requests, strict=True))),
            waiting_seconds=max(waiting_seconds),
            memory_gigabytes=max(memory_bytes) / 1e9,
            upcoming=StepFacts.over_ranks(list(zip(*upcoming, strict=True))) if upcoming else None,
        )

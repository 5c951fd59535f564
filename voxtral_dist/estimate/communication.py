"""Bytes that a rank sends in a step, by engine and collective, from the code of the engines.

P parameters, of which P_t are trained, and P_b that the backward pass needs again; s bytes of a value in the model's
precision and r of one whose gradient is reduced. A step of m micro-batches moves, each over all W ranks:

    ZeRO-0   all-reduce r P_t, once
    ZeRO-1   the sum of gradients r P_t and an all-gather s P_t of updated weights, once
    ZeRO-2   the sum r P_t in each micro-batch, and the all-gather s P_t once
    ZeRO-3   in each micro-batch an all-gather s (P - p) for the forward pass, another one for the backward pass of what
             was released, and a reduce-scatter r P_t; once, an all-gather s p of the small parameters that are never
             released (`stage3_param_persistence_threshold`)
    FSDP2    in each micro-batch an all-gather s P, with the encoder's blocks once for each chunk, an all-gather s P_b
             for the backward pass, and a reduce-scatter r P_t; with replicas of R ranks these are over R ranks, and an
             all-reduce r P_t / R over the W / R replicas follows once

DeepSpeed (0.19.8, `stage_1_and_2.py:average_tensor`) sums gradients of ZeRO-1 and ZeRO-2 by an all-reduce of each
bucket (`use_multi_rank_bucket_allreduce`, its default) or by one reduction to the owner of each part, which sends half
as much; in bfloat16 stage 1 always takes all-reduces (`bf16_optimizer.py`).

A released weight of ZeRO-3 is one that is not used again within `stage3_max_reuse_distance` values: the last half of
that distance before the end of the forward pass stays gathered, or the last `stage3_prefetch_bucket_size` values if
these are more. The prefetcher has met them again, in the backward pass, before they would be released
(`partitioned_param_coordinator.py:__params_to_release`).

What a rank sends of a collective over n ranks and V bytes (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69(2),
2009, for rings; github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md):

                      all-reduce      all-gather    reduce-scatter   reduction of V / n to each rank in turn
    NCCL, rings       2 (n-1)/n V     (n-1)/n V     (n-1)/n V        (n-1)/n V
    gloo              2 (n-1)/n V     (n-1)/n V     2 (n-1)/n V      (1 - 2/S + (n-1)/n^2) V

gloo reduces and scatters by an all-reduce (torch 2.13, `ProcessGroupGloo::_reduce_scatter_base`). It reduces in a ring,
after which each rank sends its part to the root. The ring has S segments of at most 1 MiB, n times some number that is
two or more, and ends when all but two of them have passed (gloo, `gloo/reduce.cc`), though (n-1)/n would be enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from voxtral_dist.estimate.engine_traffic import values_of_backward_pass
from voxtral_dist.estimate.sharding import Fsdp2Sharding, Sharding, ZeroSharding
from voxtral_dist.model.blocks import blocks_of
from voxtral_dist.model.voxtral import TrainedVoxtral

Kind = Literal["all-reduce", "all-gather", "reduce-scatter", "reductions"]
Moment = Literal["forward pass", "backward pass", "last backward pass", "update"]
Library = Literal["nccl", "gloo"]

_FLOAT32_BYTES = 4
_GLOO_SEGMENT_BYTES = 2**20


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind at one moment of a step.

    num_bytes: all that is gathered or reduced, over all calls. num_ranks: of each group. stride: distance of
    neighbouring ranks of a group; 1 if these are neighbours. num_calls: how many carry these bytes. is_hidden: whether
    the engine computes meanwhile. Forward and backward pass are those of each micro-batch.
    """

    kind: Kind
    moment: Moment
    num_bytes: float
    num_ranks: int
    num_calls: float
    is_hidden: bool
    stride: int = 1

    def sent_bytes(self, library: Library = "nccl") -> float:
        """Bytes that a rank sends; see the module."""
        ranks = self.num_ranks
        fraction = (ranks - 1) / ranks
        if self.kind == "all-reduce" or (self.kind, library) == ("reduce-scatter", "gloo"):
            fraction *= 2
        elif (self.kind, library) == ("reductions", "gloo"):
            per_rank = max(2, math.ceil(self.num_bytes / self.num_calls / ranks / _GLOO_SEGMENT_BYTES))
            fraction = 1 - 2 / (ranks * per_rank) + (ranks - 1) / ranks**2
        return fraction * self.num_bytes


class Communication:
    """The collectives of a step of one model under a sharding. num_ranks: of the run."""

    def __init__(self, model: TrainedVoxtral, sharding: Sharding, num_ranks: int, num_chunks: int = 1) -> None:
        """Look at a model, which may be on the meta device.

        Args:
            model: the model with its trained parameters.
            sharding: as configured.
            num_ranks: of the run.
            num_chunks: of the encoder in a micro-batch.
        """
        self._sharding = sharding
        self.num_ranks = num_ranks
        self._dtype: torch.dtype = model.lm_head.weight.dtype
        self._size = self._dtype.itemsize
        parameters = list(model.parameters())
        self._sizes: list[int] = [one.numel() for one in parameters]
        self._trained: int = sum(one.numel() for one in parameters if one.requires_grad)
        self._num_trained_tensors = sum(one.requires_grad for one in parameters)
        self._again = values_of_backward_pass(model)[0]
        embeddings = list(model.model.language_model.embed_tokens.parameters())
        # ZeRO-3 gathers each layer through which a gradient passes, whether that needs the weight or not.
        self._ends = sum(one.numel() for one in model.lm_head.parameters()) if self._again else 0
        self._ends += sum(one.numel() for one in embeddings if one.requires_grad)
        encoder = blocks_of(model)["encoder"]
        self._chunked = sum(one.numel() for block in encoder for one in block.parameters()) * (num_chunks - 1)
        self._chunked_calls = len(encoder) * (num_chunks - 1)
        # Blocks, the rest of the encoder, the projector, the embedding, the last layer, and the last norm.
        self._num_units = sum(map(len, blocks_of(model).values())) + 5

    def step(self, num_micro_batches: int) -> list[Collective]:
        """The collectives of a step; those of a micro-batch are repeated for each."""
        return [*(one for one in self.micro_batch() for _ in range(num_micro_batches)), *self.once()]

    def sent_bytes(self, num_micro_batches: int, library: Library = "nccl") -> float:
        """Bytes that a rank sends in a step."""
        return sum(one.sent_bytes(library) for one in self.step(num_micro_batches))

    def micro_batch(self) -> list[Collective]:
        """The collectives of each micro-batch."""
        if self.num_ranks == 1:
            return []
        if isinstance(self._sharding, Fsdp2Sharding):
            return list(self._fsdp2_micro_batch(self._sharding))
        return list(self._zero_micro_batch(self._sharding))

    def once(self) -> list[Collective]:
        """The collectives with the last micro-batch of a step and after it."""
        if self.num_ranks == 1:
            return []
        if isinstance(self._sharding, Fsdp2Sharding):
            return list(self._between_replicas(self._sharding))
        return list(self._zero_once(self._sharding))

    def _fsdp2_micro_batch(self, sharding: Fsdp2Sharding) -> Iterator[Collective]:
        ranks, units = sharding.ranks_per_replica or self.num_ranks, self._num_units
        if ranks == 1:
            return
        size, gathered = self._size, sum(self._sizes)
        again = self._chunked if sharding.reshards else 0
        calls = units + (self._chunked_calls if sharding.reshards else 0)
        yield Collective("all-gather", "forward pass", size * (gathered + again), ranks, calls, is_hidden=True)
        if sharding.reshards:
            # The embedding is not needed, and the last layer is still there.
            yield Collective("all-gather", "backward pass", size * self._again, ranks, units - 2, is_hidden=True)
        reduced = sharding.reduce_bytes * self._trained
        yield Collective("reduce-scatter", "backward pass", reduced, ranks, units, is_hidden=True)

    def _between_replicas(self, sharding: Fsdp2Sharding) -> Iterator[Collective]:
        ranks = sharding.ranks_per_replica or self.num_ranks
        replicas = self.num_ranks // ranks
        if replicas > 1:
            reduced = sharding.reduce_bytes * self._trained / ranks
            yield Collective("all-reduce", "last backward pass", reduced, replicas, self._num_units, True, ranks)

    def _zero_micro_batch(self, sharding: ZeroSharding) -> Iterator[Collective]:
        ranks, overlaps = self.num_ranks, sharding.has_overlap
        if sharding.stage == 2:
            yield self._sum_of_gradients(sharding, "backward pass")
        elif sharding.stage == 3:
            released = sum(self._sizes) - self._persistent(sharding)
            encoder_is_released = self._chunked > 0 and sum(self._sizes) > sharding.max_reuse
            gathered = self._size * (released + (self._chunked if encoder_is_released else 0))
            calls = max(self._num_units, gathered / self._size / max(1, sharding.prefetch_bucket))
            yield Collective("all-gather", "forward pass", gathered, ranks, calls, overlaps)
            kept = max(sharding.max_reuse // 2, sharding.prefetch_bucket)
            again = max(0, min(self._again + self._ends, released) - kept)
            if again:
                share = again / released
                yield Collective("all-gather", "backward pass", self._size * again, ranks, share * calls, overlaps)
            yield self._sum_of_gradients(sharding, "backward pass")

    def _zero_once(self, sharding: ZeroSharding) -> Iterator[Collective]:
        ranks = self.num_ranks
        if sharding.stage == 0:
            reduced = _FLOAT32_BYTES * self._trained
            yield Collective("all-reduce", "last backward pass", reduced, ranks, self._num_buckets(sharding), False)
            return
        if sharding.stage == 1:
            yield self._sum_of_gradients(sharding, "last backward pass")
        if sharding.stage < 3:
            # One call for each group of the optimizer: with and without weight decay.
            yield Collective("all-gather", "update", self._size * self._trained, ranks, 2, False)
        elif persistent := self._persistent(sharding):
            yield Collective("all-gather", "update", self._size * persistent, ranks, 1, False)

    def _sum_of_gradients(self, sharding: ZeroSharding, moment: Moment) -> Collective:
        buckets = self._num_buckets(sharding)
        kind: Kind = "reduce-scatter"
        if sharding.stage < 3:
            # In bfloat16 DeepSpeed replaces the optimizer of stage 1 by one that knows no reductions.
            always = sharding.stage == 1 and self._dtype == torch.bfloat16
            kind = "all-reduce" if sharding.all_reduces or always else "reductions"
        if kind == "reductions":
            # A bucket is cut where the next rank's part begins.
            buckets += self.num_ranks - 1
        # DeepSpeed waits for the device before each reduction (`stage_1_and_2.py:allreduce_and_copy`).
        is_hidden = sharding.has_overlap and kind != "reductions"
        return Collective(kind, moment, self._size * self._trained, self.num_ranks, buckets, is_hidden)

    def _num_buckets(self, sharding: ZeroSharding) -> int:
        return math.ceil(self._trained / sharding.reduce_bucket)

    def _persistent(self, sharding: ZeroSharding) -> int:
        sizes: list[int] = [size for size in self._sizes if size <= sharding.persistent_size]
        return sum(sizes)

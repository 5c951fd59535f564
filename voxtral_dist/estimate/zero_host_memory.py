"""Host memory of a rank under ZeRO with offloading, as DeepSpeed 0.19.8 allocates it.

With P_t trained parameters, W ranks and s bytes of a value in the model's precision, stage 3 (stage3.py) allocates

    s P / W    weights, pinned one by one as they are sharded (`partition_parameters.py:_partition_param`)
    s P_t / W  trained weights again, one block for each group of the optimizer
               (`_create_param_groups_fp16_flat_cpu_memory`), after which those pinned one by one are freed
    4 P_t / W  float32 weights of each sub-group (`_create_fp32_partitions`)
    4 P_t / W  gradients of each sub-group, which the update reads (`initialize_optimizer_states`)
    4 P_t / W  gradients that are accumulated, in one block (`_setup_for_real_optimizer`)
    8 P_t / W  Adam's moments, in the first update

in this order. Gradients are written as zeros in pageable memory, then copied to pinned memory. Stages 1 and 2
(stage_1_and_2.py) pin float32 weights, a copy in the model's precision and gradients of each group, and one buffer of
the size of the largest parameter. In float32, where they have no buffer on the device, they also accumulate gradients
of whole parameters in pinned memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from voxtral_dist.checkpoints.files import FILE_BYTES
from voxtral_dist.distributed.process_settings import exact_pinned_bytes
from voxtral_dist.estimate.host_ledger import HostLedger, PinnedPool
from voxtral_dist.estimate.phases import FLOAT32_BYTES, MASTER_BYTES, ModelSizes, Setting
from voxtral_dist.estimate.sharding import ZeroSharding

# A partition of a group starts at a multiple of this many values (`nccl_start_alignment_factor`).
_ALIGNMENT = 2


def play_building(sharding: ZeroSharding, sizes: ModelSizes, setting: Setting) -> HostLedger:
    """What a rank allocates in host memory while its engine is built, in order.

    The ledger ends when the engine has returned the pinned blocks that it no longer uses.
    """
    return _played(sharding, sizes, setting, exact_pinned_bytes())


# An estimate is made for each of many micro-batches, which all need this.
@lru_cache(maxsize=64)
def _played(sharding: ZeroSharding, sizes: ModelSizes, setting: Setting, max_cached: int | None) -> HostLedger:
    ledger = HostLedger(PinnedPool(max_cached) if setting.device == "gpu" else None)
    if sharding.stage == 3:
        _build_stage_3(ledger, sharding, sizes, setting)
    elif sharding.optimizer_place == "host":
        _build_stage_1_or_2(ledger, sharding, sizes, setting)
    ledger.return_cached()
    return ledger


@lru_cache(maxsize=64)
def mean_checkpoint_bytes(sizes: ModelSizes, setting: Setting) -> float:
    """Bytes that a rank collects before it writes a file of a checkpoint: its peak, as the mean over all ranks.

    Rank r takes every W-th trained parameter with its moments, and writes a file when they reach `FILE_BYTES`.
    """
    trained = [size for size, is_trained in zip(sizes.sizes, sizes.are_trained, strict=True) if is_trained]
    of_value = MASTER_BYTES + setting.trained.moments
    peaks = []
    for rank in range(setting.num_ranks):
        pending = peak = 0.0
        for size in trained[rank :: setting.num_ranks]:
            pending += size * of_value
            peak = max(peak, pending)
            pending = 0.0 if pending >= FILE_BYTES else pending
        peaks.append(peak)
    return sum(peaks) / setting.num_ranks


def _build_stage_3(ledger: HostLedger, sharding: ZeroSharding, sizes: ModelSizes, setting: Setting) -> None:
    groups = [[-(-size // setting.num_ranks) for size in group] for group in sizes.groups]
    if sharding.weights_place == "host":
        _shard_weights(ledger, sharding, sizes, setting, groups)
    if sharding.optimizer_place != "device":
        _create_optimizer(ledger, sharding, setting, groups)


def _shard_weights(
    ledger: HostLedger, sharding: ZeroSharding, sizes: ModelSizes, setting: Setting, groups: list[list[int]]
) -> None:
    blocks = []
    for size, is_trained in zip(sizes.sizes, sizes.are_trained, strict=True):
        num_bytes = -(-size // setting.num_ranks) * setting.value_bytes
        if sharding.pins_weights:
            # The pageable partition is allocated, but never written to.
            block = ledger.pin("weights", num_bytes, from_pageable=False)
            blocks += [block] if is_trained else []
        else:
            ledger.hold("weights", num_bytes)
    for group in groups:
        # This block is pinned whatever `pin_memory` says.
        ledger.pin("weights", sum(group) * setting.value_bytes, from_pageable=False)
    for block in blocks:
        ledger.unpin(block)
    if not sharding.pins_weights:
        ledger.drop("weights", sum(sum(group) for group in groups) * setting.value_bytes)


def _create_optimizer(ledger: HostLedger, sharding: ZeroSharding, setting: Setting, groups: list[list[int]]) -> None:
    sub_groups = [sub_group for group in groups for sub_group in _sub_groups(group, sharding.sub_group)]
    if sharding.optimizer_place == "host":
        _convert(ledger, setting, sub_groups)
        largest = max(sub_groups) * FLOAT32_BYTES
        ledger.hold("buffers", largest)
        for size in sub_groups:
            _zeros(ledger, sharding, "gradients", size * FLOAT32_BYTES)
        ledger.drop("buffers", largest)
    _zeros(ledger, sharding, "gradients", sum(sub_groups) * FLOAT32_BYTES)


def _convert(ledger: HostLedger, setting: Setting, sub_groups: Sequence[int]) -> None:
    """Float32 weights are cloned from a conversion; the one before is freed when the next one exists."""
    before = 0
    for size in sub_groups:
        converted = size * MASTER_BYTES if setting.value_bytes != MASTER_BYTES else 0
        ledger.hold("buffers", converted)
        ledger.drop("buffers", before)
        ledger.hold("optimizer", size * MASTER_BYTES)
        before = converted
    ledger.drop("buffers", before)


def _sub_groups(group: Sequence[int], limit: int) -> Iterator[int]:
    """Sizes of sub-groups: one is closed by the parameter with which it reaches the limit."""
    if limit >= sum(group):
        yield sum(group)
        return
    size = 0
    for number, partition in enumerate(group):
        size += partition
        if size >= limit or number == len(group) - 1:
            yield size
            size = 0


def _build_stage_1_or_2(ledger: HostLedger, sharding: ZeroSharding, sizes: ModelSizes, setting: Setting) -> None:
    alignment = _ALIGNMENT * setting.num_ranks
    partitions = [-(-sum(group) // alignment) * _ALIGNMENT for group in sizes.groups]
    for size in partitions:
        _zeros(ledger, sharding, "optimizer", size * MASTER_BYTES)
        _zeros(ledger, sharding, "weights", size * setting.value_bytes)
    _zeros(ledger, sharding, "buffers", sizes.largest_trained * setting.value_bytes)
    for size in partitions:
        _zeros(ledger, sharding, "gradients", size * FLOAT32_BYTES)


def _zeros(ledger: HostLedger, sharding: ZeroSharding, kind: str, num_bytes: int) -> None:
    """A tensor that is filled in pageable memory, and pinned if the optimizer's states are."""
    if sharding.pins_optimizer:
        ledger.pin(kind, num_bytes, from_pageable=True)
    else:
        ledger.hold(kind, num_bytes)

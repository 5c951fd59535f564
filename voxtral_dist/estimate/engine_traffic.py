"""Bytes that an engine moves in a rank's memory besides the model's own kernels: casts, buckets and the update.

For each value of a parameter, with W ranks that share one copy, s bytes of a value in the model's precision, and r of
one whose gradient is reduced:

    FSDP2    gathering: (4 + s) / W for the cast of trained weights, 2 s / W into the buffer that ranks gather into
             (which a single rank does without), and 2 s out of it; again in the backward pass where a gradient
             arrives, but for the embedding and the last layer. A gradient: s + r into the buffer that is reduced, 2 r
             more on a single rank, which copies instead of reducing; (r + 4) / W if r is not 4; 12 / W to add it to
             earlier micro-batches
    ZeRO-3   gathering, with several ranks: 2 s / W and 2 s. A gradient: 2 s into its bucket, (s + 4) / W out of it
    ZeRO-2   a gradient: 2 s into its bucket, (s + 4) / W out of it
    ZeRO-1   a gradient: s + 4 for its cast to float32, and once a step 8 into its bucket and 8 / W out of it
    update   divided by W: 4 for the norm, 8 for clipping, and 28 for AdamW in one kernel (weight, gradient and moments
             are read; the gradient is not written), 20 with Muon's one moment. ZeRO-1 to 3 also copy gradients (8) and
             cast weights (4 + s)

They follow from the code of torch 2.13 (`torch/distributed/fsdp/_fully_shard`) and DeepSpeed 0.19.8
(`deepspeed/runtime/zero`). Where weights or moments take less than 4 and 8 bytes (`state_bytes`), casts and the update
take less too. Not counted: communication, transfers to host memory and back, updates on the host, and Muon's products.
"""

from __future__ import annotations

from dataclasses import dataclass

from voxtral_dist.config import OptimizerConfig
from voxtral_dist.estimate.phases import FLOAT32_BYTES, ModelSizes
from voxtral_dist.estimate.sharding import Fsdp2Sharding, Sharding, ZeroSharding
from voxtral_dist.estimate.state_bytes import StateBytes, state_bytes
from voxtral_dist.model.blocks import blocks_of
from voxtral_dist.model.voxtral import TrainedVoxtral

_ADDITION_BYTES = 3 * FLOAT32_BYTES
_COPY_BYTES = 2 * FLOAT32_BYTES


@dataclass(frozen=True)
class EngineTraffic:
    """Bytes of a rank: for its first micro-batch of a step, for each later one, and for the update."""

    first_micro_batch: float
    later_micro_batch: float
    update: float

    def step_bytes(self, num_micro_batches: int) -> float:
        """Bytes of all micro-batches of a step, without the update."""
        return self.first_micro_batch + (num_micro_batches - 1) * self.later_micro_batch


def engine_traffic(
    model: TrainedVoxtral, sharding: Sharding, optimizer: OptimizerConfig, num_ranks: int
) -> EngineTraffic:
    """The traffic of one model, which may be on the meta device, under a sharding."""
    sizes, size = ModelSizes.of(model, optimizer), int(model.lm_head.weight.element_size())
    states = state_bytes(model, optimizer, sharding)
    if isinstance(sharding, Fsdp2Sharding):
        ranks = sharding.ranks_per_replica or num_ranks
        gathered = _fsdp2_gathering(model, sharding, sizes, size, ranks, states.weight)
        first = gathered + sizes.trained * _fsdp2_gradient(sharding, size, ranks)
        update = 0.0 if sharding.is_offloaded else sizes.trained / ranks * _update(optimizer, states)
        return EngineTraffic(first, first + sizes.trained * _ADDITION_BYTES / ranks, update)
    gathered = _zero3_gathering(model, sharding, sizes, size, num_ranks)
    partition = sizes.trained / num_ranks
    copies = 0
    if sharding.stage == 0:
        first = later = 0.0
    else:
        copies = _COPY_BYTES + FLOAT32_BYTES + size
        cast = size + FLOAT32_BYTES
        if sharding.stage == 1:
            # Buckets are reduced with the last micro-batch, which always exists.
            first = sizes.trained * (cast + _COPY_BYTES) + partition * _COPY_BYTES
            later = sizes.trained * (cast + _ADDITION_BYTES)
        else:
            first = gathered + sizes.trained * 2 * size + partition * cast
            later = first + partition * _ADDITION_BYTES
    update = partition * (_update(optimizer, states) + copies) if sharding.optimizer_place == "device" else 0.0
    return EngineTraffic(first, later, update)


def _update(optimizer: OptimizerConfig, states: StateBytes) -> float:
    """Bytes of a value: weights and moments are read and written, the gradient is read twice, and clipped."""
    passes = 4 if optimizer.max_grad_norm else 2
    return passes * states.gradient + 2 * (states.weight + states.moments)


def _fsdp2_gathering(
    model: TrainedVoxtral, sharding: Fsdp2Sharding, sizes: ModelSizes, size: int, ranks: int, weight_bytes: float
) -> float:
    values, trained = sizes.all, sizes.trained
    if sharding.reshards:
        again, trained_again = values_of_backward_pass(model)
        values, trained = values + again, trained + trained_again
    # Offloaded weights are cast on the host, and copied from there.
    cast = 0 if sharding.is_offloaded else weight_bytes + size
    copy_in = 2 * size if ranks > 1 else 0
    return (trained * cast + values * copy_in) / ranks + values * 2 * size


def _fsdp2_gradient(sharding: Fsdp2Sharding, size: int, ranks: int) -> float:
    reduced = sharding.reduce_bytes
    copy = 2 * reduced if ranks == 1 else 0
    cast = (reduced + FLOAT32_BYTES) / ranks if reduced != FLOAT32_BYTES else 0
    return size + reduced + copy + cast


def _zero3_gathering(model: TrainedVoxtral, sharding: ZeroSharding, sizes: ModelSizes, size: int, ranks: int) -> float:
    if sharding.stage < 3 or (ranks == 1 and sharding.weights_place == "device"):
        return 0.0
    return (sizes.all + values_of_backward_pass(model)[0]) * (2 * size / ranks + 2 * size)


def values_of_backward_pass(model: TrainedVoxtral) -> tuple[int, int]:
    """Values of the weights that the backward pass gathers, all and trained ones: of layers that a gradient reaches.

    An embedding's gradient needs no weights, and the last layer stays gathered.
    """
    encoder, language_model = model.model.audio_tower, model.model.language_model
    blocks = blocks_of(model)
    modules = [
        *(encoder.conv1, encoder.conv2, encoder.embed_positions, *blocks["encoder"], encoder.layer_norm),
        model.model.multi_modal_projector,
        *(language_model.embed_tokens, *blocks["language_model"], language_model.norm),
    ]
    reached, values, trained = False, 0, 0
    for module in modules:
        own = sum(one.numel() for one in module.parameters() if one.requires_grad)
        reached = reached or own > 0
        if reached and module is not language_model.embed_tokens:
            values += sum(one.numel() for one in module.parameters())
            trained += own
    return values, trained

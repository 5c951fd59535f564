"""Whether ranks decode with whole weights or with sharded ones: decided by the memory that is free on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import VoxtralConfig

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.distributed.collectives import max_over_ranks
from voxtral_dist.distributed.devices import free_memory_bytes
from voxtral_dist.distributed.world import World, ranks_on_node
from voxtral_dist.engine.engine import Engine

# Of the free memory: allocators cannot use all of it, and other processes come and go.
_USABLE = 0.9
# Tensors as large as the widest of a block that its forward pass holds at the same time.
_LIVE_TENSORS = 4


@contextmanager
def decoding_weights(
    engine: Engine, settings: EvaluationConfig, decoding_bytes: int, world: World
) -> Iterator[tuple[nn.Module, bool, str]]:
    """The engine's model in evaluation mode, whether ranks must call it in lockstep, and a line that says why.

    All ranks enter together and get the same answer.

    Args:
        engine: that holds the weights.
        settings: may ask for one or the other.
        decoding_bytes: what a rank needs besides weights: see `decoding_bytes`.
        world: all ranks.
    """
    copy_bytes = engine.full_weights_bytes()
    if copy_bytes == 0:
        with engine.full_weights() as model:
            yield model, False, "weights are whole on every rank"
        return
    missing = copy_bytes + decoding_bytes - round(_USABLE * free_memory_bytes(world.device, ranks_on_node(world.size)))
    # On the rank that has the least room.
    missing = max_over_ranks([missing], world)[0]
    is_whole = missing <= 0 if settings.weights == "auto" else settings.weights == "gathered"
    needed = f"whole weights and decoding take {(copy_bytes + decoding_bytes) / 1e9:.1f} GB of a rank"
    room = f"{-missing / 1e9:.1f} GB less than" if missing <= 0 else f"{missing / 1e9:.1f} GB more than"
    line = f"{needed}, {room} what is free on the fullest; weights are {'gathered' if is_whole else 'sharded'}"
    if settings.weights != "auto":
        line += f", as `evaluation.weights: {settings.weights}` says"
    with engine.full_weights() if is_whole else engine.sharded_weights() as model:
        yield model, not is_whole, line


def decoding_bytes(
    config: VoxtralConfig, num_positions: int, num_beams: int, windows_per_chunk: int, dtype: torch.dtype
) -> int:
    """An estimate of what decoding takes of a rank besides weights: keys and values, and the widest tensors of a block.

    Args:
        config: of the model.
        num_positions: prompts and new tokens of the largest batch, padding included.
        num_beams: rows of each utterance.
        windows_per_chunk: that the encoder takes at a time.
        dtype: of weights and activations.
    """
    text, audio = config.text_config, config.audio_config
    cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    # Rows are whole in the first pass over a prompt; afterwards they are one token long.
    language_model = num_beams * num_positions * (cached + _LIVE_TENSORS * text.intermediate_size)
    encoder = _LIVE_TENSORS * windows_per_chunk * audio.max_source_positions * audio.intermediate_size
    return int((language_model + encoder) * dtype.itemsize)

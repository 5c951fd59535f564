"""A plain copy of a sharded model, without an engine's hooks, so that each rank can decode on its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from voxtral_dist.config import ModelConfig, TrainableConfig
from voxtral_dist.model.encoder import ChunkedEncoder
from voxtral_dist.model.voxtral import DTYPES, TrainedVoxtral, fill_meta_model, trained_meta_model


@contextmanager
def plain_copy(
    config: ModelConfig,
    trainable: TrainableConfig,
    weights: Iterable[tuple[str, Tensor]],
    buffers: Iterable[tuple[str, Tensor]],
) -> Iterator[TrainedVoxtral]:
    """A model in evaluation mode with these weights, which come in the order of its parameters.

    On exit its memory is freed at once, even while something still refers to the model: its wrapped methods form a
    reference cycle, which would live until the next garbage collection.
    """
    copy = _filled(trained_meta_model(config.without_float8, trainable, DTYPES[config.precision]), weights, buffers)
    ChunkedEncoder(copy, config.encoder_windows_per_chunk)
    try:
        yield copy
    finally:
        copy.to("meta")


@torch.no_grad()
def _filled(
    model: TrainedVoxtral, weights: Iterable[tuple[str, Tensor]], buffers: Iterable[tuple[str, Tensor]]
) -> TrainedVoxtral:
    fill_meta_model(model, weights, buffers)
    model.eval()
    return model

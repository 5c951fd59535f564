"""A plain copy of a sharded model: it has no hooks of an engine, so ranks decode without waiting for each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from voxtral_dist.config import RunConfig
from voxtral_dist.model.encoder import ChunkedEncoder
from voxtral_dist.model.voxtral import DTYPES, TrainedVoxtral, fill_meta_model, trained_meta_model


@contextmanager
def evaluation_copy(
    config: RunConfig, weights: Iterable[tuple[str, Tensor]], buffers: Iterable[tuple[str, Tensor]]
) -> Iterator[TrainedVoxtral]:
    """The model of a run in evaluation mode, with weights that come in the order of its parameters.

    Its memory is given back at the end, whoever still holds the model: its wrapped methods hold it in a circle, which
    only a collection of garbage would end.
    """
    copy = _filled_copy(config, weights, buffers)
    try:
        yield copy
    finally:
        copy.to("meta")


@torch.no_grad()
def _filled_copy(
    config: RunConfig, weights: Iterable[tuple[str, Tensor]], buffers: Iterable[tuple[str, Tensor]]
) -> TrainedVoxtral:
    copy = trained_meta_model(config.model, config.trainable, DTYPES[config.model.precision])
    fill_meta_model(copy, weights, buffers)
    ChunkedEncoder(copy, config.model.encoder_windows_per_chunk)
    copy.eval()
    return copy

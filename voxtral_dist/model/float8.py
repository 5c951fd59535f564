"""Products in eight-bit floating point (FP8 formats for deep learning: Micikevicius et al., arXiv 2209.05433).

In training, a matrix of the language model is multiplied three times:

    output = input weight^T        gradient of input = gradient weight        gradient of weight = gradient^T input

torchao rounds all six factors to e4m3 (three bits of mantissa) with a scale, a power of two, for each row or column
that a product sums over. Weights, gradients and what is kept for the backward pass stay in the model's precision.
Scales are those of a micro-batch, so they do not depend on the number of ranks; with `model.mlp_chunk_tokens` those of
gradients of weights are of a chunk, on whose number ranks agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import nn

from voxtral_dist.config import ModelConfig
from voxtral_dist.errors import UserError

# GPUs from this compute capability on multiply float8: Ada (8.9), Hopper (9.0) and their successors.
_CAPABILITY = (8, 9)


def train_in_float8(blocks: Iterable[nn.Module], config: ModelConfig) -> None:
    """Let blocks of the language model train as `model.float8` says, in place.

    Raises:
        UserError: torchao is not installed, or no matrix would be computed in float8.
    """
    if config.float8 is None:
        return
    refuse_without_torchao()
    from voxtral_dist.model.float8_linear import MULTIPLE, convert_linear_layers

    if not convert_linear_layers(blocks, is_emulated=config.float8 == "rowwise_emulated"):
        raise UserError(
            "`model.float8` found no trained matrix in the blocks of the language model whose dimensions are multiples "
            f"of {MULTIPLE}. Frozen ones, also those beside adapters, are not computed in float8, because torchao "
            "would compute their gradients too: remove `model.float8`, or train the language model's matrices."
        )


def refuse_without_torchao() -> None:
    """Refuse float8 where torchao is missing.

    Raises:
        UserError: it is not installed.
    """
    if find_spec("torchao") is None:
        raise UserError("`model.float8` needs the package torchao: install it by `pip install 'voxtral-dist[float8]'`.")


def refuse_without_hardware(config: ModelConfig, device: torch.device) -> None:
    """Refuse products in float8 on a device that has none.

    Raises:
        UserError: the device is a CPU or an older GPU.
    """
    if config.float8 != "rowwise":
        return
    if device.type != "cuda":
        found = "this is a CPU"
    elif torch.cuda.get_device_capability(device) < _CAPABILITY:
        found = f"{torch.cuda.get_device_name(device)} is older"
    else:
        return
    raise UserError(
        "`model.float8: rowwise` needs a GPU that multiplies float8 (compute capability 8.9 or newer: Ada, Hopper, "
        f"Blackwell), but {found}: remove it, or choose rowwise_emulated, which is slow."
    )

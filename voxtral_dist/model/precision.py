"""Precisions in which a device computes."""

from __future__ import annotations

import torch

from voxtral_dist.errors import UserError

# GPUs from this compute capability on compute in bfloat16: Ampere and its successors.
_CAPABILITY = (8, 0)
_OF_DECODING = "choose float16 (`--precision float16`)"


def refuse_without_bfloat16(precision: str, device: torch.device, remedy: str = _OF_DECODING) -> None:
    """Refuse bfloat16 on a GPU that has none, where torch emulates it slowly.

    Args:
        precision: of the computation, as in `ModelConfig`.
        device: where it is to run.
        remedy: how the user chooses another precision, as a clause.

    Raises:
        UserError: the GPU is older than the Ampere generation.
    """
    if precision != "bfloat16" or device.type != "cuda" or torch.version.hip is not None:
        return
    if torch.cuda.get_device_capability(device) >= _CAPABILITY:
        return
    raise UserError(
        "bfloat16 needs a GPU of the Ampere generation or newer (compute capability 8.0), but this is a "
        f"{torch.cuda.get_device_name(device)}: {remedy}."
    )

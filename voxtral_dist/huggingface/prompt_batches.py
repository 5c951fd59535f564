"""The prompts of batches that were made for training."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from voxtral_dist.data.examples.micro_batch import IGNORED_LABEL, pad_left
from voxtral_dist.errors import UserError


def prompts_of(batch: Mapping[str, Tensor], pad_id: int) -> dict[str, Tensor]:
    """A batch without completions, padded on the left: what `generate` continues.

    Args:
        batch: `input_ids`, `attention_mask` and `labels`: int64 `(B, T)`, padded on either side; `input_features`.
        pad_id: fills rows up.

    Raises:
        UserError: a row has no prompt, because its labels cover the whole input.
    """
    is_prompt = (batch["attention_mask"] == 1) & (batch["labels"] == IGNORED_LABEL)
    if not is_prompt.any(dim=1).all():
        raise UserError(
            f"A batch has labels on its prompts, so that there is nothing to generate from: set `labels` to "
            f"{IGNORED_LABEL} there, as TranscriptionCollator does."
        )
    rows = zip(batch["input_ids"], is_prompt, strict=True)
    input_ids, attention_mask = pad_left([row[mask].tolist() for row, mask in rows], pad_id)
    device = batch["input_ids"].device
    return {
        "input_ids": input_ids.to(device),
        "attention_mask": attention_mask.to(device),
        "input_features": batch["input_features"],
    }

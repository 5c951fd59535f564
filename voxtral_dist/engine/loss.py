"""The loss of a micro-batch, the same for every engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from voxtral_dist.data.batches import IGNORED_LABEL, MicroBatch
from voxtral_dist.data.features import LogMel, mask_features


class LossOfMicroBatch:
    """The summed cross entropy of a micro-batch's targets, in float32, for a model or an engine around it."""

    def __init__(self, log_mel: LogMel) -> None:
        self._log_mel = log_mel

    def __call__(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """The sum over all targets, a scalar with gradient; 0 without targets. `batch` is on the model's device.

        Logits are computed for the last K positions only, and the model is called without `labels`: what is divided by
        what is the caller's decision.
        """
        features = mask_features(self._log_mel(batch.pcm, batch.windows_per_example), batch.feature_masks)
        outputs: Any = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            input_features=features,
            logits_to_keep=batch.labels.shape[1],
            use_cache=False,
        )
        logits = outputs.logits.float()
        return F.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )

"""The loss of a micro-batch, the same for every engine."""

from __future__ import annotations

from torch import Tensor, nn

from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.model.features import LogMel, mask_features


class LossOfMicroBatch:
    """The summed cross entropy of a micro-batch's targets, in float32, of a `TrainedVoxtral` or an engine around it."""

    def __init__(self, log_mel: LogMel, chunk_tokens: int) -> None:
        """Logits are computed for so many targets at a time."""
        self._log_mel = log_mel
        self._chunk_tokens = chunk_tokens

    def __call__(self, model: nn.Module, batch: MicroBatch, audio: Tensor | None = None) -> Tensor:
        """The sum over all targets, a scalar with gradient; 0 without targets. What divides it is the caller's matter.

        Args:
            model: that computes it.
            batch: on the model's device.
            audio: what the model takes for the audio; None takes the features of the batch's windows, masked.
        """
        if audio is None:
            audio = mask_features(self._log_mel(batch.pcm, batch.windows_per_example), batch.feature_masks)
        loss: Tensor = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            input_features=audio,
            target_ids=batch.target_ids,
            target_places=batch.target_places,
            chunk_tokens=self._chunk_tokens,
        )
        return loss

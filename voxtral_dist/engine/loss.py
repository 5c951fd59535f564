"""The loss of a micro-batch, shared by all engines."""

from __future__ import annotations

from torch import Tensor, nn

from voxtral_dist.data.examples.micro_batch import MicroBatch
from voxtral_dist.model.features import LogMel, mask_features


class LossOfMicroBatch:
    """The cross entropy of a `TrainedVoxtral`, or an engine around it, summed over a micro-batch's targets in float32.

    Logits are computed for `chunk_tokens` targets at a time. With `label_smoothing` e, targets are distributions: 1 - e
    on the label, and e evenly over the vocabulary (Szegedy et al., arXiv 1512.00567), as in torch's `cross_entropy`.

    Example:
        >>> import torch
        >>> from voxtral_dist import LogMel, LossOfMicroBatch, UtteranceReader, VoxtralPrompts
        >>> from voxtral_dist import collate, load_voxtral, read_index
        >>> from voxtral_dist.config import ModelConfig
        >>> prompts = VoxtralPrompts.from_pretrained("models/tiny")
        >>> reader = UtteranceReader(read_index(["shards/speech"]), prompts, max_target_tokens=None)
        >>> batch = collate([reader.example(0)], prompts)
        >>> model = load_voxtral(ModelConfig(path="models/tiny", precision="float32"))
        >>> summed_loss = LossOfMicroBatch(LogMel.from_pretrained("models/tiny", torch.device("cpu")), chunk_tokens=512)
        >>> loss = summed_loss(model, batch) / batch.num_target_tokens
        >>> loss.backward()
    """

    def __init__(self, log_mel: LogMel, chunk_tokens: int, label_smoothing: float = 0.0) -> None:
        self._log_mel = log_mel
        self._chunk_tokens = chunk_tokens
        self._label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: MicroBatch, audio: Tensor | None = None) -> Tensor:
        """Compute the sum over all targets: a scalar with gradient, 0 without targets. The caller divides it.

        Args:
            model: the model, or the engine around it.
            batch: the micro-batch, on the model's device.
            audio: the model's `input_features`; None takes the batch's features, or computes those of its windows.
        """
        if audio is None:
            audio = batch.features
        if audio is None:
            audio = mask_features(self._log_mel(batch.pcm, batch.windows_per_example), batch.feature_masks)
        loss: Tensor = model(
            input_ids=batch.input_ids,
            input_features=audio,
            audio_places=batch.audio_places,
            target_ids=batch.target_ids,
            target_places=batch.target_places,
            chunk_tokens=self._chunk_tokens,
            num_mlp_chunks=batch.num_mlp_chunks,
            label_smoothing=self._label_smoothing,
        )
        return loss

"""What decodes: a model folder, a name on the hub, or a checkpoint of a run."""

from __future__ import annotations

from pathlib import Path

from voxtral_dist.checkpoints.loading import config_of_checkpoint, is_checkpoint, load_checkpoint
from voxtral_dist.config import EvaluationConfig, ModelConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.evaluation.batch_decoder import BatchDecoder
from voxtral_dist.model.encoder import ChunkedEncoder
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.weights import load_for_inference

_WINDOWS_PER_CHUNK: int = ModelConfig.model_fields["encoder_windows_per_chunk"].default


def load_decoder(
    model_path: str, prompts: VoxtralPrompts, settings: EvaluationConfig, precision: str, world: World
) -> BatchDecoder:
    """A model, whole and ready to decode on this rank's device.

    Raises:
        UserError: the path leads to no Voxtral, or to a checkpoint that is damaged.
    """
    load = load_checkpoint if is_checkpoint(model_path) else load_for_inference
    model = load(model_path, world.device, precision)
    ChunkedEncoder(model, _WINDOWS_PER_CHUNK)
    log_mel = LogMel.from_pretrained(processor_path(model_path), world.device)
    return BatchDecoder(model, prompts, log_mel, settings)


def processor_path(model_path: str) -> str:
    """Where tokenizer and features are described: a checkpoint of a run has them where the run began."""
    return config_of_checkpoint(Path(model_path)).model.path if is_checkpoint(model_path) else model_path

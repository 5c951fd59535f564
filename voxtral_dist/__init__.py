"""Fine-tune Mistral's Voxtral speech models on transcription, sharded over any number of GPUs.

The names below are the public interface. Each is imported when it is first used, so that `import voxtral_dist` takes no
time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from voxtral_dist.config import RunConfig, load_config
    from voxtral_dist.data.examples.micro_batch import MicroBatch, collate
    from voxtral_dist.data.examples.prompting import context_text
    from voxtral_dist.data.examples.reader import UtteranceReader
    from voxtral_dist.data.examples.shard_dataset import ShardDataset
    from voxtral_dist.data.examples.transforms import LengthAwareTimeStretch
    from voxtral_dist.data.stored.index import ShardIndex, read_index
    from voxtral_dist.engine.loss import LossOfMicroBatch
    from voxtral_dist.errors import UserError
    from voxtral_dist.evaluate import evaluate_model
    from voxtral_dist.huggingface.collator import TranscriptionCollator
    from voxtral_dist.huggingface.evaluation_mixin import TranscriptionEvaluationMixin
    from voxtral_dist.huggingface.metrics import WordErrorMetrics
    from voxtral_dist.huggingface.trainer import TranscriptionTrainer
    from voxtral_dist.model.features import LogMel
    from voxtral_dist.model.prompts import VoxtralPrompts
    from voxtral_dist.model.tiny import TinyShape, build_tiny_voxtral
    from voxtral_dist.model.weights import load_for_inference, load_voxtral
    from voxtral_dist.scoring.normalizer import Normalizer, normalizer
    from voxtral_dist.scoring.word_errors import ErrorCounts, word_errors
    from voxtral_dist.train import train_model
    from voxtral_dist.transcription.question import Question
    from voxtral_dist.transcription.recordings import RecordingError
    from voxtral_dist.transcription.transcriber import Transcriber
    from voxtral_dist.transcription.transcripts import RecordingTranscript, Segment

__version__ = "0.1.0"

_MODULES = {
    "config": ("RunConfig", "load_config"),
    "data.examples.micro_batch": ("MicroBatch", "collate"),
    "data.examples.prompting": ("context_text",),
    "data.examples.reader": ("UtteranceReader",),
    "data.examples.shard_dataset": ("ShardDataset",),
    "data.examples.transforms": ("LengthAwareTimeStretch",),
    "data.stored.index": ("ShardIndex", "read_index"),
    "engine.loss": ("LossOfMicroBatch",),
    "errors": ("UserError",),
    "evaluate": ("evaluate_model",),
    "huggingface.collator": ("TranscriptionCollator",),
    "huggingface.evaluation_mixin": ("TranscriptionEvaluationMixin",),
    "huggingface.metrics": ("WordErrorMetrics",),
    "huggingface.trainer": ("TranscriptionTrainer",),
    "model.features": ("LogMel",),
    "model.prompts": ("VoxtralPrompts",),
    "model.tiny": ("TinyShape", "build_tiny_voxtral"),
    "model.weights": ("load_for_inference", "load_voxtral"),
    "scoring.normalizer": ("Normalizer", "normalizer"),
    "scoring.word_errors": ("ErrorCounts", "word_errors"),
    "train": ("train_model",),
    "transcription.question": ("Question",),
    "transcription.recordings": ("RecordingError",),
    "transcription.transcriber": ("Transcriber",),
    "transcription.transcripts": ("RecordingTranscript", "Segment"),
}
_MODULE_OF_NAME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ErrorCounts",
    "LengthAwareTimeStretch",
    "LogMel",
    "LossOfMicroBatch",
    "MicroBatch",
    "Normalizer",
    "Question",
    "RecordingError",
    "RecordingTranscript",
    "RunConfig",
    "Segment",
    "ShardDataset",
    "ShardIndex",
    "TinyShape",
    "Transcriber",
    "TranscriptionCollator",
    "TranscriptionEvaluationMixin",
    "TranscriptionTrainer",
    "UserError",
    "UtteranceReader",
    "VoxtralPrompts",
    "WordErrorMetrics",
    "build_tiny_voxtral",
    "collate",
    "context_text",
    "evaluate_model",
    "load_config",
    "load_for_inference",
    "load_voxtral",
    "normalizer",
    "read_index",
    "train_model",
    "word_errors",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The names of the module, those not imported yet included."""
    return sorted({*globals(), *__all__})

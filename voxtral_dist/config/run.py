"""The whole configuration of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from voxtral_dist.config.data import StorageConfig, TrainDataConfig
from voxtral_dist.config.engine import CheckpointConfig, EngineConfig, OptimizerConfig
from voxtral_dist.config.evaluation import EvaluationConfig
from voxtral_dist.config.model import ModelConfig, TrainableConfig
from voxtral_dist.config.section import Section


class MetricsConfig(Section):
    """What is recorded of a run besides `metrics.jsonl`."""

    tensorboard: bool = True
    """Write scalars to `run_dir/tensorboard`, where the package tensorboard is installed."""

    peak_tflops: float | None = Field(default=None, gt=0)
    """Dense 10^12 operations per second of one rank's device in the model's precision, which the model FLOPs
    utilisation is measured against. None: the data sheet's figure where the device is known, else no utilisation."""


class RunConfig(Section):
    """Everything that determines a run."""

    run_dir: Path
    """Checkpoints, metrics, evaluations and the exported model go here. Starting again with the same folder resumes."""

    num_steps: int = Field(gt=0)
    """Optimizer updates in total."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the order of the data, of augmentation and of dropout."""

    model: ModelConfig
    trainable: TrainableConfig = TrainableConfig()
    train_data: TrainDataConfig
    storage: StorageConfig = StorageConfig()
    optimizer: OptimizerConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.optimizer.warmup_steps >= self.num_steps:
            raise ValueError(
                f"`optimizer.warmup_steps` must be smaller than `num_steps` ({self.num_steps}), but is "
                f"{self.optimizer.warmup_steps} instead"
            )
        return self

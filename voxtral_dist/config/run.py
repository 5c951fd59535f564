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
    """Metrics of a run besides `metrics.jsonl`, which is always written."""

    tensorboard: bool = True
    """Write scalars for TensorBoard to `run_dir/tensorboard`. Does nothing where the package tensorboard is not
    installed."""

    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak dense throughput of one rank's device in the model's precision, in 10^12 operations per second, for the
    model FLOPs utilization. None: the value of the data sheet for known devices, and no utilization for others."""


class RunConfig(Section):
    """Everything that determines a run.

    Example:
        >>> from voxtral_dist import RunConfig
        >>> config = RunConfig.model_validate(
        ...     {
        ...         "run_dir": "runs/first",
        ...         "num_steps": 100,
        ...         "model": {"path": "models/tiny"},
        ...         "train_data": {"shards": ["shards/speech"], "slots_per_step": 8, "max_examples": 4},
        ...         "optimizer": {"learning_rate": 1e-5, "warmup_steps": 10},
        ...         "engine": {"deepspeed": "ds_configs/zero1.json"},
        ...     }
        ... )
        >>> config.train_data.slots_per_step
        8
    """

    run_dir: Path
    """Folder of checkpoints, metrics, evaluations and the exported model. A run with the folder of an earlier one
    resumes it."""

    num_steps: int = Field(gt=0)
    """Total number of optimizer updates."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the data order, augmentation, initial adapters and dropout."""

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

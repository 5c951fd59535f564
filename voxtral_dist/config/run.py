"""The whole configuration of a run."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from voxtral_dist.config.data import StorageConfig, TrainDataConfig
from voxtral_dist.config.engine import CheckpointConfig, EngineConfig, OptimizerConfig
from voxtral_dist.config.evaluation import EvaluationConfig
from voxtral_dist.config.model import ModelConfig, TrainableConfig
from voxtral_dist.config.section import HubName, Section, sorted_set
from voxtral_dist.errors import UserError
from voxtral_dist.output.counting import counted

TrackerKind = Literal["mlflow", "trackio", "wandb"]


class MetricsConfig(Section):
    """Metrics of a run besides `metrics.jsonl`, which is always written."""

    tensorboard: bool = True
    """Write scalars for TensorBoard to `run_dir/tensorboard`. Does nothing where the package tensorboard is not
    installed."""

    trackers: Annotated[tuple[TrackerKind, ...], AfterValidator(sorted_set)] = ()
    """Services that get the scalars, the configuration, evaluated utterances and the report of the run besides:
    `wandb` (Weights & Biases), `mlflow` and `trackio`. Each is set up by its own variables and needs its package. Steps
    are sent once a checkpoint has them."""

    prometheus_port: int | None = Field(default=None, ge=1, le=65535)
    """Port on which the first rank of each host serves the newest measurements to Prometheus (`/metrics`), and an
    answer to probes (`/alive`): 503 once it has heard nothing of other ranks for `distributed.timeout_seconds`. Needs
    the package prometheus_client. None: nothing is served."""

    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak dense throughput of one rank's device in the model's precision, in 10^12 operations per second, for the
    model FLOPs utilization. None: the value of the data sheet for known devices, and no utilization for others."""


class DistributedConfig(Section):
    """What ranks do together."""

    start_timeout_seconds: float = Field(default=600.0, gt=0)
    """Limit of waiting for all ranks to come at the start: after it the run ends with code 76 and the ranks that were
    not heard of. Longer than hosts may start apart, by the time of pulling an image for example."""

    timeout_seconds: float = Field(default=600.0, gt=0)
    """Limit of a collective operation, in all process groups: a rank that waits longer for another one ends the run.
    Longer than the longest wait for data and than the slowest part of a save; what rank 0 does alone for long
    (scores, exports, the end of a save), and unequal parts of evaluations, are waited for without a limit."""

    watchdog_seconds: float | None = Field(default=300.0, gt=0)
    """Seconds without progress on any rank after which the run ends with code 77, and the stacks of all threads of all
    ranks are written to `run_dir/hangs/`. Steps, waits for data, saves, evaluations and exports may take five times as
    long as the longest one so far, if that is more; until some were measured, six times this value. Less than
    `timeout_seconds`, or collectives end the run before. Debuggers need null. None: no watchdog."""

    @property
    def timeouts(self) -> tuple[timedelta, timedelta]:
        """The limits of a collective operation and of the start, as `joined_world` takes them."""
        return timedelta(seconds=self.timeout_seconds), timedelta(seconds=self.start_timeout_seconds)


class CardConfig(Section):
    """Statements of model cards that a run cannot know; see docs/publishing.md.

    `voxtral-dist export` has options for most of them too.
    """

    license: str | None = Field(default=None, min_length=1)
    """Licence of the trained model by the hub's identifier, such as `apache-2.0`. None: the card says that it is not
    stated."""

    data_license: str | None = Field(default=None, min_length=1)
    """Licence of the training data, in any words. None: the card says that it is not stated."""

    datasets: tuple[HubName, ...] = ()
    """Names of the training data on the hub, if it is there."""

    base_model: HubName | None = None
    """Name of the initial model on the hub, where `model.path` is a folder. None: `model.path`, if that is a name or
    lies in the hub's cache."""


class ExportConfig(Section):
    """The trained model that a run writes at its end."""

    layouts: Annotated[tuple[Literal["hf", "mistral"], ...], AfterValidator(sorted_set)] = ("hf", "mistral")
    """Layouts of the full model: `hf` (`export/`) for transformers, peft and llama.cpp; `mistral` (`export-mistral/`)
    for vLLM. Each has the model's size on disk. `voxtral-dist export` writes others later."""

    card: CardConfig = CardConfig()
    """Statements of the model cards."""


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

    num_steps: int | None = Field(default=None, gt=0)
    """Total number of optimizer updates. None: `num_epochs` decides."""

    num_epochs: float | None = Field(default=None, gt=0)
    """Times through the training data, instead of `num_steps`; may be a fraction. The shards decide the number of
    steps, on any number of ranks: the start of a run and `voxtral-dist plan` print it. A whole number draws every
    utterance that passes the filters that often; with a mixture, as often as its weights say. None: `num_steps`
    decides."""

    max_run_hours: float | None = Field(default=None, gt=0)
    """Hours from the start of the ranks within which they save a checkpoint and exit with code 75, so that the same
    command resumes. The measured times of steps, saves and evaluations tell when to stop; at least one step is made.
    None: no limit."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the data order, augmentation, initial adapters and dropout."""

    model: ModelConfig
    trainable: TrainableConfig = TrainableConfig()
    train_data: TrainDataConfig
    storage: StorageConfig = StorageConfig()
    optimizer: OptimizerConfig
    engine: EngineConfig
    distributed: DistributedConfig = DistributedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    metrics: MetricsConfig = MetricsConfig()
    export: ExportConfig = ExportConfig()

    def total_steps(self, steps_per_epoch: int) -> int:
        """The number of optimizer updates, given the steps of an epoch of the plan.

        Raises:
            UserError: it is not larger than `optimizer.warmup_steps`.
        """
        if self.num_epochs is None:
            assert self.num_steps is not None, "one of them is given"
            return self.num_steps
        # Less than a whole step more would be rounding, as of 0.1 * 30.
        num_steps = max(1, math.ceil(self.num_epochs * steps_per_epoch - 1e-6))
        if self.optimizer.warmup_steps >= num_steps:
            raise UserError(
                f"`optimizer.warmup_steps` must be smaller than the number of steps, but is "
                f"{self.optimizer.warmup_steps}, and {counted(self.num_epochs, 'epoch', 'g')} (`num_epochs`) of "
                f"{counted(steps_per_epoch, 'step')} have {num_steps} instead."
            )
        return num_steps

    @property
    def length(self) -> str:
        """The length of the run as it is configured, such as `2,000 steps` or `3 epochs`."""
        if self.num_epochs is not None:
            return counted(self.num_epochs, "epoch", "g")
        assert self.num_steps is not None, "one of them is given"
        return counted(self.num_steps, "step", ",")

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if (self.num_steps is None) == (self.num_epochs is None):
            instead = "none is" if self.num_steps is None else "both are"
            raise ValueError(
                f"one of `num_steps` and `num_epochs` must be set, and the other one null, but {instead} set instead"
            )
        return self

    @model_validator(mode="after")
    def _bounds_what_is_estimated(self) -> Self:
        data = self.train_data
        bounds = (data.max_windows, data.max_tokens, data.max_duration_seconds)
        if self.model.activation_checkpointing == "auto" and all(bound is None for bound in bounds):
            raise ValueError(
                "`model.activation_checkpointing: auto` needs a bound of micro-batches, but `train_data` has none "
                "instead: set `train_data.max_windows`, `max_tokens` or `max_duration_seconds`"
            )
        return self

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.num_steps is not None and self.optimizer.warmup_steps >= self.num_steps:
            raise ValueError(
                f"`optimizer.warmup_steps` must be smaller than `num_steps` ({self.num_steps}), but is "
                f"{self.optimizer.warmup_steps} instead"
            )
        return self

"""Sections `optimizer`, `engine` and `checkpoint`: the update, its sharding over ranks, and its saved state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from voxtral_dist.config.section import Component, Section


class OptimizerConfig(Section):
    """The optimizer and its learning rate schedule."""

    algorithm: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """`adamw` (Loshchilov and Hutter, arXiv 1711.05101) is fused on GPUs, and DeepSpeed's CPU Adam under offload.
    `adamw_8bit` keeps the moments of matrices in 8 bits: 2 bytes per parameter instead of 8. Those of the embedding,
    of vectors and of adapters stay float32. It needs FSDP2. `muon` updates the matrices of blocks by DeepSpeed's Muon
    and all other parameters by AdamW; it needs ZeRO-3 and `max_grad_norm: 0`."""

    master_weights: bool = True
    """Keep trained weights and sums of gradients in float32. False keeps both in bfloat16, which takes 4 bytes per
    parameter instead of 8, and rounds them stochastically. It needs FSDP2, and does nothing for adapters."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate, which is reached after `warmup_steps`."""

    component_learning_rates: dict[Component, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Peak learning rates of single components instead of `learning_rate`, on the same schedule."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    """Decay rates of Adam's first and second moments."""

    epsilon: float = Field(default=1e-8, gt=0)
    """Adam's epsilon: added to the square root of the second moment before the division."""

    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay. Does nothing for norms, biases and embeddings. 0 disables it."""

    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay rate of exponential moving averages of the trained weights. They begin with the initial weights, are
    updated after every step, and reach about 1 / (1 - ema_decay) steps back: 0.999 is for runs of many thousands of
    steps. They take 4 bytes per trained parameter, sharded as the optimizer's states are, and are evaluated and
    exported (see `evaluation.ema`). Refused where DeepSpeed keeps the optimizer on NVMe. None: no averages."""

    warmup_steps: int = Field(default=100, ge=0)
    """Steps in which the learning rate grows linearly from 0 to its peak. Fewer than the steps of the run."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay from the peak to `final_learning_rate_fraction` of it at the last step. `constant`: no
    decay."""

    final_learning_rate_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step, as a fraction of the peak. Does nothing with `schedule: constant`."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Maximum global L2 norm of gradients, above which they are scaled down to it. 0 disables clipping."""

    max_skipped_in_a_row: int = Field(default=3, ge=0)
    """Updates in a row that all ranks skip because the loss or the gradient norm is not finite; one more ends the run.
    Skipped steps keep their place in the data and in the schedule, and metrics.jsonl names their samples. 0: the first
    one ends the run, as it always does where weights are not finite. Overflows of float16 do not count."""

    spike_factor: float | None = Field(default=10.0, gt=1)
    """A gradient norm above this many times the median of the last 100 norms is a spike, which metrics.jsonl records
    with its samples. None: no record."""

    skip_spikes: bool = False
    """Skip the update of a spike. At most `max_skipped_in_a_row` updates in a row are skipped; the next one is made,
    because gradients that stay large are no spike. Does nothing without `spike_factor`."""


class Fsdp2Config(Section):
    """PyTorch's `fully_shard` (FSDP2): weights, gradients and optimizer states are sharded over ranks, block by
    block."""

    reshard_after_forward: bool = True
    """Free gathered weights after each block's forward pass, as ZeRO-3 does. False keeps them until the backward pass:
    one gather less, and memory for the whole model, as under ZeRO-2."""

    ranks_per_replica: int | None = Field(default=None, gt=0)
    """Ranks that hold one copy of the model together (hybrid sharding), such as the GPUs of a node, so that weights are
    gathered inside nodes only. Must divide the number of ranks. None: all ranks hold one copy."""

    reduce_precision: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients are summed over ranks."""

    cpu_offload: bool = False
    """Keep weights, gradients and optimizer states in host memory, and compute updates on the CPU."""


class EngineConfig(Section):
    """The engine that shards and updates the model: exactly one of `deepspeed` and `fsdp2`."""

    deepspeed: Path | None = None
    """DeepSpeed's configuration file, or the name of one that comes with the package: `zero0`, `zero1`, `zero2`,
    `zero2_offload`, `zero3`, `zero3_offload`, `zero3_nvme`, `zero3_24b`. Batch size, accumulation, precision, optimizer
    and clipping are set in this configuration; a file that sets one of them is refused."""

    nvme_dir: Path | None = None
    """Folder on a local drive of each node for what DeepSpeed's file offloads to `nvme`. Does nothing where the file
    sets `nvme_path` or offloads nothing there. Its contents are not needed after the run."""

    fsdp2: Fsdp2Config | None = None
    """Settings of FSDP2; `{}` takes the defaults."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.deepspeed is None) == (self.fsdp2 is None):
            has = "none" if self.deepspeed is None else "both"
            raise ValueError(f"`engine` must have either `engine.deepspeed` or `engine.fsdp2`, but has {has} instead")
        return self


class CheckpointConfig(Section):
    """When the state of the run is saved, and how many checkpoints are kept."""

    every_steps: int = Field(default=500, gt=0)
    """Steps between checkpoints. One is also written before every evaluation, at the last step, and when a signal
    (SIGTERM or SIGUSR1) stops the run."""

    every_seconds: float | None = Field(default=None, gt=0)
    """Seconds between checkpoints, besides `every_steps`: one is also begun at the end of the first step after them.
    None: steps alone decide."""

    asynchronous: bool | None = None
    """Write checkpoints while training goes on: it stands still while the state is copied to host memory, and a thread
    writes the copy. At most one is under way, and a run that is killed meanwhile resumes from the one before. Saves
    before evaluations and at the end are waited for. None: where the copy takes at most half of the free host memory
    of every rank."""

    keep: int = Field(default=2, gt=0)
    """Complete checkpoints to keep. Older ones are removed after a newer one is complete, except the best one (see
    `evaluation.selection`)."""

    upload: str | None = Field(default=None, pattern=r"^[A-Za-z][\w+.:-]*://.+")
    """URL of a folder, such as `s3://bucket/runs/one`, for copies of this run's checkpoints, in any protocol of fsspec
    that writes. Rank 0 uploads each one in the background after it is complete, reads it back, and keeps `keep` of them
    and the best one there too. A run whose `run_dir` has none as new downloads the newest whole one at its start, with
    metrics and evaluations. A store that does not answer never stops training: that is said once, recorded, and tried
    again. Section `storage` has the limits of requests. None: no copies."""

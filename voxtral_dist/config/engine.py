"""Sections `optimizer`, `engine` and `checkpoint`: the update, its sharding, and when its state is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from voxtral_dist.config.section import Component, Section


class OptimizerConfig(Section):
    """The optimizer and its learning rate over the steps."""

    algorithm: Literal["adamw", "muon"] = "adamw"
    """`adamw` (Loshchilov and Hutter, arXiv 1711.05101), fused on GPUs and DeepSpeed's own on the CPU under offload;
    `muon` updates the matrices of blocks by DeepSpeed's Muon and all else by AdamW: ZeRO-3 alone, without clipping."""

    learning_rate: float = Field(gt=0)
    """The peak, reached after `warmup_steps`."""

    component_learning_rates: dict[Component, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Other peaks for some components, which warm up and fall in the same proportion."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    """Decay rates of the running means of the gradient and of its square."""

    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean square."""

    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled; not applied to norms, biases and embeddings."""

    warmup_steps: int = Field(default=100, ge=0)
    """Steps of linear growth from zero."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The way from the peak to `final_learning_rate_fraction` of it at the last step."""

    final_learning_rate_fraction: float = Field(default=0.1, ge=0, le=1)
    """What is left of the peak at the end. Does nothing with `schedule: constant`."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global L2 norm. 0 switches clipping off."""


class Fsdp2Config(Section):
    """torch's `fully_shard` (FSDP2): weights, gradients and optimizer states are sharded over ranks, block by block."""

    reshard_after_forward: bool = True
    """Give gathered weights back after each block's forward pass, as ZeRO-3 does. False keeps them until the backward
    pass: one gather less, and memory for the whole model, as under ZeRO-2."""

    ranks_per_replica: int | None = Field(default=None, gt=0)
    """Ranks that share one copy of the model (hybrid sharding), such as the GPUs of a node: weights then travel inside
    nodes alone. Must divide the number of ranks. None: all ranks share one."""

    reduce_precision: Literal["float32", "bfloat16"] = "float32"
    """Of gradients while they are summed over ranks."""

    cpu_offload: bool = False
    """Keep weights, gradients and optimizer states in host memory, where the update is computed too."""


class EngineConfig(Section):
    """What shards and updates the model: DeepSpeed or FSDP2."""

    deepspeed: Path | None = None
    """DeepSpeed's own file, such as `ds_configs/zero3.json`. Batch size, accumulation, precision, optimizer and
    clipping belong to this configuration; a file that sets one of them too is refused."""

    nvme_dir: Path | None = None
    """A folder on a local drive of each node for what DeepSpeed's file offloads to `nvme` without an `nvme_path` of its
    own. What lies there is of no use after the run; checkpoints hold it too."""

    fsdp2: Fsdp2Config | None = None
    """FSDP2 instead; `{}` takes its defaults."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.deepspeed is None) == (self.fsdp2 is None):
            has = "none" if self.deepspeed is None else "both"
            raise ValueError(f"`engine` must have either `engine.deepspeed` or `engine.fsdp2`, but has {has} instead")
        return self


class CheckpointConfig(Section):
    """When the whole state of the run is written, and how many of these are kept."""

    every_steps: int = Field(default=500, gt=0)
    """A checkpoint is also written at the last step and when the run is asked to stop (SIGTERM)."""

    keep: int = Field(default=2, gt=0)
    """Complete checkpoints that stay on disk; older ones are removed after a newer one is complete."""

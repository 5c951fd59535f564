"""Sections `model` and `trainable`: the checkpoint, its precision, and the parameters that are trained."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from voxtral_dist.config.section import Component, Section, sorted_set


class ActivationCheckpointingConfig(Section):
    """Blocks that keep only their input in the forward pass and compute the rest again in the backward pass.

    About a third more computation for such a block, and activation memory of one block instead of all.
    """

    encoder: int = Field(default=0, ge=0)
    """Every n-th block of the encoder: 1 takes all of them, 2 every other one, 0 none."""

    language_model: int = Field(default=0, ge=0)
    """Every n-th block of the language model."""


class ModelConfig(Section):
    """Which Voxtral is trained, and in which precision."""

    path: str
    """A Hugging Face folder or hub name of a Voxtral checkpoint: weights, `tekken.json` and processor files."""

    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the weights in forward and backward passes. The optimizer's own copy is float32 in any case. `float16` is for
    GPUs without bfloat16: its loss is scaled, and steps whose gradients overflow are left out."""

    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention kernel. `flash_attention_2` needs the package flash-attn, a GPU and half precision; `auto` takes it
    where it is there, and torch's `sdpa` elsewhere. What is used is said at the start."""

    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    """Which blocks trade computation for memory."""

    compile_blocks: bool = False
    """Compile each block by `torch.compile`: minutes at the start, and less memory traffic after. Not under ZeRO-3,
    whose hooks inside of blocks leave nothing to fuse."""

    loss_chunk_tokens: int = Field(default=2048, gt=0)
    """Target tokens whose logits over the vocabulary are computed at a time, and again in the backward pass: the memory
    of the loss does not grow with the batch."""

    encoder_windows_per_chunk: int = Field(default=16, gt=0)
    """Windows (30 s each) that the encoder takes at a time. Micro-batches with more of them on some rank go through it
    in several passes, each computed again in the backward pass: its memory does not grow with the length of clips."""


class LoraConfig(Section):
    """Low-rank adapters (LoRA: Hu et al., arXiv 2106.09685) by the package peft, beside weights that are frozen."""

    rank: int = Field(default=16, gt=0)
    """Of the two matrices of an adapter."""

    alpha: float = Field(default=32.0, gt=0)
    """The adapter's output is scaled by `alpha / rank`."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the adapter's input."""

    use_dora: bool = False
    """Train the magnitudes of the weight's columns too (DoRA: Liu et al., arXiv 2402.09353)."""

    targets: dict[Component, tuple[str, ...]] = Field(
        default={"language_model": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
        min_length=1,
    )
    """Names of the linear layers that get adapters, by component. The encoder has `q_proj`, `k_proj`, `v_proj`,
    `out_proj`, `fc1` and `fc2`; the projector `linear_1` and `linear_2`."""

    trained_whole: Annotated[tuple[Component, ...], AfterValidator(sorted_set)] = ()
    """Components whose own weights are trained beside the adapters. All others are frozen."""

    @model_validator(mode="after")
    def _is_either(self) -> Self:
        for component in self.trained_whole:
            if component in self.targets:
                raise ValueError(
                    f"`trainable.lora`: `{component}` must be in `targets` or `trained_whole`, but is in both instead"
                )
        return self


class TrainableConfig(Section):
    """Which parameters are trained; the table of them is printed at the start. Default: all."""

    frozen: tuple[str, ...] = ()
    """Components (`encoder`, `projector`, `language_model`) and patterns of parameter names with `*`, such as
    `*.embed_tokens.*`, that keep their weights. A pattern that fits no parameter is refused."""

    lora: LoraConfig | None = None
    """Train adapters instead of weights."""

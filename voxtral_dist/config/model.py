"""Sections `model` and `trainable`: the initial checkpoint, its precision, and which parameters are trained."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from voxtral_dist.config.section import Component, Section, sorted_set


class ActivationCheckpointingConfig(Section):
    """Blocks that keep only their input in the forward pass, and recompute their activations in the backward pass.

    A checkpointed block costs about a third more computation, and needs activation memory for one block at a time.
    """

    encoder: int = Field(default=0, ge=0)
    """Checkpoint every n-th block of the encoder: 1 checkpoints all, 2 every other one, 0 none."""

    language_model: int = Field(default=0, ge=0)
    """Checkpoint every n-th block of the language model, in the same way."""


class ModelConfig(Section):
    """The model that is trained, its precision, and what trades computation for memory."""

    path: str
    """Folder or Hugging Face hub name of a Voxtral checkpoint, with weights, `tekken.json` and processor files."""

    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of weights and activations in forward and backward passes. The optimizer always updates a float32 copy.
    `float16` is for GPUs without bfloat16: its loss is scaled, and updates whose gradients overflow are skipped."""

    float8: Literal["rowwise", "rowwise_emulated"] | None = None
    """Compute products with the trained matrices of the language model's blocks in eight-bit floating point (e4m3), in
    training, by torchao's recipe of this name: each row of a factor has a scale of its own. Output layer, encoder,
    projector, adapters and matrices whose dimensions are no multiples of 16 compute in `precision`. So do evaluations;
    weights stay as they are, and so do checkpoints and exports. `rowwise` needs a GPU of the Ada, Hopper or Blackwell
    generation, `precision: bfloat16`, and for any gain `compile_blocks`. `rowwise_emulated` rounds alike and multiplies
    in float32: it shows on any device, slowly, what rounding costs a model. Needs the package torchao, and FSDP2 or a
    ZeRO stage below 3. None: all products in `precision`."""

    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention kernel. `auto` is PyTorch's `sdpa`, which brings FlashAttention on GPUs. `flash_attention_2` needs the
    package flash-attn, a GPU of the Ampere generation or newer, and bfloat16 or float16; it is used in training, where
    attention has no mask, while decoding uses `sdpa`."""

    cudnn_attention: bool = False
    """Allow cuDNN's attention kernel in the language model, which PyTorch prefers on Hopper and Blackwell GPUs. It
    builds a plan for each new length of a micro-batch, up to a second each, and has given NaN gradients for masks
    (pytorch/pytorch#196678). The encoder, whose windows all have one length, may always use it."""

    activation_checkpointing: ActivationCheckpointingConfig | Literal["auto"] = ActivationCheckpointingConfig()
    """Blocks whose activations are recomputed. The default is none. `auto` recomputes as little as fits into the
    smallest GPU of all ranks, by the estimate of `voxtral-dist plan` for the largest micro-batch that `train_data`
    allows, which must have `max_windows`, `max_tokens` or `max_duration_seconds`; on CPUs it recomputes nothing."""

    activation_offloading: bool = False
    """Keep the inputs of the language model's checkpointed blocks in pinned host memory between forward and backward
    pass, by copies that overlap with computation. The encoder bounds its memory by `encoder_windows_per_chunk`
    instead. Needs `activation_checkpointing.language_model`. Saves nothing on CPUs."""

    mlp_chunk_tokens: int | None = Field(default=None, gt=0)
    """Maximum positions for which the MLP of a block of the language model is computed at a time, in training; its
    intermediate values are computed again in the backward pass. In checkpointed blocks this costs no additional
    computation. Does not change the loss. None: all positions at once."""

    compile_blocks: bool | Literal["auto"] = "auto"
    """Compile each block by `torch.compile` in training, as one graph for all lengths: some minutes at the first start
    on a machine (see `storage.cache_dir`), and faster steps. `auto` compiles on GPUs that Triton supports, under FSDP2
    and ZeRO-1 and 2, where a C compiler is installed, and never with DoRA or quantized matrices. True is refused where
    that is impossible, as under ZeRO-3."""

    loss_chunk_tokens: int = Field(default=2048, gt=0)
    """Target tokens whose logits over the vocabulary are computed at a time, in the forward pass and again in the
    backward pass, so that the memory of the loss does not grow with the batch. Does not change the loss."""

    max_positions: int | None = Field(default=None, gt=0)
    """Positions of the language model that an example may take: audio, prompt and target. None: those that the model
    was trained for, 32,768 in the published models (43 minutes of audio), although their `config.json` says 131,072.
    More is possible and warned about: the model has never seen such positions, and vLLM serves no more."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability that is spread evenly over the vocabulary in training (Szegedy et al., arXiv
    1512.00567). The training loss that is recorded is the one that is minimized, with smoothing; evaluations measure
    the loss without. 0 disables it."""

    encoder_windows_per_chunk: int = Field(default=16, gt=0)
    """Maximum windows (of 30 s) that the encoder processes at a time. A micro-batch with more windows is split into
    chunks, which are recomputed in the backward pass, so that the encoder's memory does not grow with the batch. Does
    nothing for micro-batches with fewer windows on all ranks."""

    @property
    def checkpointing(self) -> ActivationCheckpointingConfig:
        """Blocks whose activations are recomputed: none until `auto` is replaced, at the start of a run."""
        chosen = self.activation_checkpointing
        return ActivationCheckpointingConfig() if chosen == "auto" else chosen

    @property
    def without_float8(self) -> Self:
        """The model as evaluations and exports take it, which needs no package for training."""
        return self if self.float8 is None else self.model_copy(update={"float8": None})

    @model_validator(mode="after")
    def _multiplies_in_float8(self) -> Self:
        # GPUs give products of rows with scales in bfloat16.
        possible = {"rowwise": ("bfloat16",), "rowwise_emulated": ("bfloat16", "float32")}
        if self.float8 is not None and self.precision not in possible[self.float8]:
            raise ValueError(
                f"`model.float8: {self.float8}` needs `model.precision: bfloat16`, but it is {self.precision} instead"
            )
        return self

    @model_validator(mode="after")
    def _has_inputs_to_offload(self) -> Self:
        if self.activation_offloading and not self.checkpointing.language_model:
            is_auto = self.activation_checkpointing == "auto"
            raise ValueError(
                "`model.activation_offloading` needs checkpointed blocks, whose inputs it offloads, but "
                f"`model.activation_checkpointing{'` is auto' if is_auto else '.language_model` is 0'} instead: set "
                f"{'`model.activation_checkpointing.language_model`' if is_auto else 'it'} to 1"
            )
        return self


class LoraConfig(Section):
    """Low-rank adapters beside frozen weights (LoRA: Hu et al., arXiv 2106.09685), by the package peft."""

    rank: int = Field(default=16, gt=0)
    """Rank of the adapter's two matrices."""

    alpha: float = Field(default=32.0, gt=0)
    """Scale of the adapter's output, which is multiplied by `alpha / rank`."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability of the adapter's input. 0 disables it."""

    use_dora: bool = False
    """Also train the magnitudes of the weight matrix, one for each output (DoRA: Liu et al., arXiv 2402.09353)."""

    targets: dict[Component, tuple[str, ...]] = Field(
        default={"language_model": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
        min_length=1,
    )
    """Names of the linear layers that get adapters, by component. The language model has those of the default; the
    encoder has `q_proj`, `k_proj`, `v_proj`, `out_proj`, `fc1` and `fc2`; the projector has `linear_1` and
    `linear_2`."""

    trained_whole: Annotated[tuple[Component, ...], AfterValidator(sorted_set)] = ()
    """Components without adapters whose own weights are trained too. All other weights are frozen."""

    quantized: Annotated[tuple[Literal["encoder", "language_model"], ...], AfterValidator(sorted_set)] = ()
    """Components whose blocks keep their frozen matrices in four bits a value (QLoRA: Dettmers et al., arXiv
    2305.14314): NF4 in blocks of 64 values, with double quantization. Embeddings, norms, output layer and projector
    stay as they are. The export merges adapters into the weights of `model.path`, not into the rounded ones. Needs the
    package bitsandbytes, and FSDP2 or a ZeRO stage below 3."""

    @model_validator(mode="after")
    def _is_either(self) -> Self:
        for component in self.trained_whole:
            if component in self.targets:
                raise ValueError(
                    f"`trainable.lora`: `{component}` must be in `targets` or `trained_whole`, but is in both instead"
                )
            if component in self.quantized:
                raise ValueError(
                    f"`trainable.lora`: `{component}` must be in `quantized` or `trained_whole`, but is in both instead"
                )
        if self.quantized and self.use_dora:
            raise ValueError(
                "`trainable.lora.quantized` does not work with `use_dora`, which computes norms of the base weights in "
                "every step: set one of them only"
            )
        return self


class TrainableConfig(Section):
    """Which parameters are trained: all by default. The start of a run prints a table of them."""

    frozen: tuple[str, ...] = ()
    """Parameters that are not trained: components (`encoder`, `projector`, `language_model`) and patterns of parameter
    names with `*`, such as `*.embed_tokens.*`. A pattern without a match is refused."""

    lora: LoraConfig | None = None
    """Train adapters instead of weights. None: train the weights."""

"""Voxtral's modules: the trained model on the meta device, which an engine fills with weights, and its parts."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, VoxtralConfig, VoxtralForConditionalGeneration

from voxtral_dist.config import ModelConfig, TrainableConfig
from voxtral_dist.errors import UserError, first_line
from voxtral_dist.model.attention import causal_mask, chosen_attention, length_mask
from voxtral_dist.model.blocks import blocks_of, wrap_blocks
from voxtral_dist.model.float8 import train_in_float8
from voxtral_dist.model.folders import refuse_wrong_model
from voxtral_dist.model.mlp_chunks import MlpChunks
from voxtral_dist.model.native import config_of_native, context_limit, native_folder
from voxtral_dist.model.quantized_linear import quantize_linear_layers
from voxtral_dist.model.row_cache import BlockCache, RowCache
from voxtral_dist.model.trainable import choose_trainable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Every Voxtral takes 16 kHz audio in frames of 10 ms, two of which make one position of the encoder.
SAMPLING_RATE = 16_000
HOP_SAMPLES = 160
FRAMES_PER_POSITION = 2
POSITIONS_PER_SECOND = SAMPLING_RATE // HOP_SAMPLES // FRAMES_PER_POSITION


class TargetLogits(nn.Linear):
    """The output layer, which can also sum the loss of targets in chunks.

    All chunks are one call of one module, so that an engine that shards weights gathers this layer once on every rank,
    whatever the number of targets.
    """

    def summed_cross_entropy(
        self, hidden: Tensor, labels: Tensor, chunk_tokens: int, label_smoothing: float = 0.0
    ) -> Tensor:
        """The cross entropy of N labels given `(N, width)` hidden states, a float32 sum that is 0 without labels."""
        chunks = zip(torch.split(hidden, chunk_tokens), torch.split(labels, chunk_tokens), strict=True)
        losses = (self._chunk(*chunk, label_smoothing) for chunk in chunks)
        return sum(losses, torch.zeros((), device=hidden.device))

    def forward(
        self,
        input: Tensor,  # noqa: A002
        labels: Tensor | None = None,
        chunk_tokens: int = 0,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The logits, or with labels their summed cross entropy."""
        if labels is None:
            return super().forward(input)
        return self.summed_cross_entropy(input, labels, chunk_tokens, label_smoothing)

    def _chunk(self, hidden: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        loss: Tensor = checkpoint(self._loss, hidden, labels, label_smoothing, use_reentrant=False)
        return loss

    def _loss(self, hidden: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        logits = super().forward(hidden).float()
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)


class TrainedVoxtral(VoxtralForConditionalGeneration):  # type: ignore[misc]  # of a package without types
    """A Voxtral whose forward pass can return the loss of some positions, without computing logits of the others.

    mlp_chunks: of the language model's blocks; None without `model.mlp_chunk_tokens`.
    """

    mlp_chunks: MlpChunks | None = None

    def __init__(self, config: VoxtralConfig) -> None:
        super().__init__(config)
        self.lm_head = TargetLogits(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)

    def forward(
        self,
        *,
        target_ids: Tensor | None = None,
        target_places: Tensor | None = None,
        audio_places: Tensor | None = None,
        chunk_tokens: int = 0,
        num_mlp_chunks: int | None = None,
        label_smoothing: float = 0.0,
        **inputs: Any,
    ) -> Any:
        """Compute what the published class does, or, given targets, their summed cross entropy.

        Args:
            target_ids: int64 `(N,)`, the targets.
            target_places: int64 `(N,)`, the positions in the flattened `(B, T)` input that predict them.
            audio_places: int64 `(A,)`, the positions of audio tokens in the flattened input, in the order of windows.
            chunk_tokens: number of targets whose logits are computed at a time.
            num_mlp_chunks: see `MlpChunks`; does nothing without `model.mlp_chunk_tokens`.
            label_smoothing: as in torch's `cross_entropy`.
            inputs: arguments of the published class; given targets, `input_ids` `(B, T)`, padded on the right, and
                `input_features` alone.
        """
        if target_ids is None or target_places is None:
            return super().forward(**inputs)
        assert audio_places is not None, "a micro-batch knows them"
        if self.mlp_chunks is not None:
            self.mlp_chunks.num_chunks = num_mlp_chunks
        audio = self.model.get_audio_features(inputs["input_features"], return_dict=True).pooler_output
        hidden = self.causal_states(inputs["input_ids"], audio, audio_places)
        return self.lm_head(hidden.flatten(0, 1)[target_places], target_ids, chunk_tokens, label_smoothing)

    def causal_states(
        self, input_ids: Tensor, audio: Tensor, audio_places: Tensor, cache: BlockCache | None = None
    ) -> Tensor:
        """Last hidden states `(B, T, width)` of rows that are padded on the right.

        The language model is run as transformers' Llama runs it: but it compares position ids with those of packed
        rows, and `get_placeholder_mask` looks for audio tokens. Both make the host wait for a GPU.

        Args:
            input_ids: int64 `(B, T)`.
            audio: embeddings of audio tokens, `(A, width)`.
            audio_places: see `forward`.
            cache: is given the keys and values of each block.
        """
        language_model = self.model.language_model
        embedded = language_model.embed_tokens(input_ids)
        hidden = embedded.flatten(0, 1).index_copy(0, audio_places, audio.to(embedded.dtype)).view_as(embedded)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        mask = causal_mask(hidden) if language_model.config._attn_implementation == "eager" else None
        return self._through_blocks(hidden, positions, mask, cache)

    def next_states(self, input_ids: Tensor, positions: Tensor, cache: RowCache, num_attended: int) -> Tensor:
        """Last hidden states `(N, width)` of one more token in each of the first N rows of a cache.

        Args:
            input_ids: int64 `(N,)`.
            positions: int64 `(N,)`, of these tokens in their rows.
            cache: holds all tokens before them.
            num_attended: positions that attention covers, more than any of `positions`.
        """
        hidden = self.model.language_model.embed_tokens(input_ids[:, None])
        mask = length_mask(positions, num_attended, hidden.dtype)
        return self._through_blocks(hidden, positions[:, None], mask, cache.appending(positions, num_attended))[:, 0]

    def _through_blocks(
        self, hidden: Tensor, positions: Tensor, mask: Tensor | None, cache: BlockCache | None
    ) -> Tensor:
        language_model = self.model.language_model
        angles = language_model.rotary_emb(hidden, position_ids=positions)
        for block in language_model.layers:
            hidden = block(hidden, attention_mask=mask, position_embeddings=angles, past_key_values=cache)
        states: Tensor = language_model.norm(hidden)
        return states

    # `generate` reads the signature to learn which arguments it may pass.
    forward.__signature__ = signature(VoxtralForConditionalGeneration.forward)  # type: ignore[attr-defined]


def trained_meta_model(config: ModelConfig, trainable: TrainableConfig, dtype: torch.dtype) -> TrainedVoxtral:
    """The meta model of a run in training mode, with adapters, frozen parameters and checkpointing as configured.

    Raises:
        UserError: the path is not a Voxtral checkpoint, or the configuration does not fit it.
    """
    voxtral_config = read_voxtral_config(config.path)
    model = build_trained_model(voxtral_config, config, trainable, dtype)
    model.generation_config = _generation_config(config.path, voxtral_config)
    return model


def build_trained_model(
    voxtral_config: VoxtralConfig, config: ModelConfig, trainable: TrainableConfig, dtype: torch.dtype
) -> TrainedVoxtral:
    """Build what `trained_meta_model` returns, given the content of `config.json`: `model.path` is not read.

    Raises:
        UserError: the configuration does not fit the model.
    """
    voxtral_config._attn_implementation = chosen_attention(config)
    with torch.device("meta"):
        model: TrainedVoxtral = TrainedVoxtral(voxtral_config).to(dtype)
    choose_trainable(model, trainable)
    for component in trainable.lora.quantized if trainable.lora else ():
        for block in blocks_of(model)[component]:
            quantize_linear_layers(block)
    train_in_float8(blocks_of(model)["language_model"], config)
    model.mlp_chunks = MlpChunks(config.mlp_chunk_tokens) if config.mlp_chunk_tokens else None
    wrap_blocks(model, config, model.mlp_chunks)
    model.train()
    return model


def _generation_config(path: str, config: VoxtralConfig) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return GenerationConfig.from_model_config(config)


def read_voxtral_config(path: str) -> VoxtralConfig:
    """The configuration of a checkpoint: its `config.json`, or in the native layout its `params.json`.

    Raises:
        UserError: the path is not a Voxtral checkpoint.
    """
    refuse_wrong_model(path)
    try:
        native = native_folder(path)
        if native is not None:
            return config_of_native(native)
        described = VoxtralConfig.get_config_dict(path)[0]
        kind = described.get("model_type")
        if described.get("quantization_config"):
            # Without their scales, its weights would be other numbers.
            raise ValueError("its weights are quantized: take the model that it was made from")
        if kind != VoxtralConfig.model_type:
            # transformers would only warn, and initialize billions of parameters at random.
            raise ValueError(f"its config.json says model_type {kind!r}")
        config: VoxtralConfig = VoxtralConfig.from_pretrained(path)
        config.text_config.max_position_embeddings = context_limit(path, config)
        return config
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_loaded(path, error) from error


def audio_tokens_per_window(config: VoxtralConfig) -> int:
    """Audio tokens of one window: 375 for 30 s.

    The projector joins encoder positions until they are as wide as the encoder's feed-forward layers.
    """
    audio = config.audio_config
    return int(audio.max_source_positions * audio.hidden_size // audio.intermediate_size)


def window_samples(config: VoxtralConfig) -> int:
    """Samples of audio in one window of the encoder: 480,000 in published models."""
    return int(config.audio_config.max_source_positions) * FRAMES_PER_POSITION * HOP_SAMPLES


def window_seconds(config: VoxtralConfig) -> float:
    """Seconds of audio in one window of the encoder: 30 in published models."""
    return float(config.audio_config.max_source_positions / POSITIONS_PER_SECOND)


def initialize_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute the buffers of a meta model: rotary frequencies in float32, which are not stored in checkpoints."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            fresh = type(module)(module.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def meta_model(config: VoxtralConfig) -> VoxtralForConditionalGeneration:
    """The meta model of a published Voxtral: its modules on the meta device, which have shapes and no storage."""
    with torch.device("meta"):
        return VoxtralForConditionalGeneration(config)


def fill_meta_model(
    model: VoxtralForConditionalGeneration,
    weights: Iterable[tuple[str, Tensor]],
    buffers: Iterable[tuple[str, Tensor]] = (),
) -> None:
    """Give a meta model its weights, in the order of its parameters, and copies of buffers.

    Each tensor keeps its precision and device: rotary frequencies stay float32 in a bfloat16 model, as in training.
    """
    for (name, _), (weight_name, weight) in zip(list(model.named_parameters()), weights, strict=True):
        assert name == weight_name, f"weights must come in the model's order, but {weight_name} came for {name}"
        set_tensor(model, name, nn.Parameter(weight, requires_grad=False))
    for name, buffer in buffers:
        set_tensor(model, name, buffer.clone())
    model.tie_weights()


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter or buffer, given by its dotted name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def _not_loaded(path: str, error: Exception) -> UserError:
    return UserError(
        f"`model.path`: {path!r} cannot be loaded as a Voxtral ({type(error).__name__}: {first_line(error)})."
    )

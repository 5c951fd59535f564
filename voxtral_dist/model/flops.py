"""Floating point operations (FLOPs) of training: those that an update needs, and those that a device computes.

A matrix product `(m, k) x (k, n)` has 2 m k n FLOPs. Norms, activations, softmax and the optimizer are not counted, as
usual in the literature. The units of a batch cost, in a forward pass:

    window     encoder: 2 F D (3 M) + 2 S D (3 D) for the convolutions over F = 2 S frames of M mel bins, and in each
               block S (8 D^2 + 4 D H) for its six linear layers and 4 S^2 D for the attention of S positions to each
               other; projector: 2 T (I E + E^2) for T audio tokens of width I
    position   language model: in each block 2 E (2 A + 2 V) + 6 E G for attention layers and SwiGLU, where A is the
               width of all queries, and V that of all keys, which groups of queries share
    pair       language model: 4 A in each block for a position and one that it attends to, which is an earlier one or
               itself: n (n + 1) / 2 pairs for n positions
    target     2 E x vocabulary for its logits; those of other positions are never computed

with the width D of the encoder, H of its feed-forward layers, E of the language model and G of its feed-forward layers.
An adapter of rank r adds 2 r (inputs + outputs) to each row of its layer.

In the backward pass, a product costs as much as in the forward pass for the gradient of its weight, if that is trained,
and as much again for the gradient of its input, if a trained parameter comes before it. So training all weights costs
3 forward passes. Training adapters of the language model costs 2 of its forward passes and 1 of the encoder, which no
gradient reaches.

*Model FLOPs* (Kaplan et al., arXiv 2001.08361, section 2.1; Chowdhery et al., arXiv 2204.02311, appendix B) count each
product that the mathematics needs once, without padding. *Hardware FLOPs* (Korthikanti et al., arXiv 2205.05198) count
the shapes that a device computes, with padding and with what activation checkpointing recomputes.

The norms of DoRA's directions are not counted: 2 r inputs (inputs + outputs) for each layer and forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from voxtral_dist.config import Component, ModelConfig, TrainableConfig
from voxtral_dist.model.blocks import is_checkpointed
from voxtral_dist.model.quantized_linear import QuantizedLinear
from voxtral_dist.model.trainable import ADAPTER_NAME
from voxtral_dist.model.voxtral import DTYPES, TrainedVoxtral, audio_tokens_per_window, trained_meta_model


@dataclass(frozen=True)
class BatchShape:
    """The sizes that the FLOPs of a batch depend on; they add up over micro-batches and ranks.

    num_windows: windows of the encoder.
    num_positions: positions of the language model.
    num_pairs: pairs of positions of which one attends to the other.
    num_target_tokens: targets whose logits are computed.
    num_recomputed_windows: the windows in checkpointed chunks of the encoder (`model.encoder`).
    """

    num_windows: int = 0
    num_positions: int = 0
    num_pairs: int = 0
    num_target_tokens: int = 0
    num_recomputed_windows: int = 0

    @classmethod
    def needed(cls, num_windows: int, positions_of_examples: Iterable[int], num_target_tokens: int) -> BatchShape:
        """The shape for model FLOPs: examples without padding. Windows count whole, as the encoder processes them."""
        positions = list(positions_of_examples)
        num_pairs = sum(count * (count + 1) // 2 for count in positions)
        return cls(num_windows, sum(positions), num_pairs, num_target_tokens)

    @classmethod
    def computed(
        cls,
        num_windows: int,
        num_examples: int,
        num_positions: int,
        num_target_tokens: int,
        num_encoder_chunks: int = 1,
    ) -> BatchShape:
        """The shape for hardware FLOPs: a micro-batch padded to `(num_examples, num_positions)`.

        All pairs of positions count, as `sdpa` with a mask computes them; FlashAttention skips most of the masked ones.
        A chunk of the encoder without windows processes a silent one.
        """
        windows = max(num_windows, num_encoder_chunks)
        return cls(
            windows,
            num_examples * num_positions,
            num_examples * num_positions**2,
            num_target_tokens,
            windows if num_encoder_chunks > 1 else 0,
        )

    def __add__(self, other: BatchShape) -> BatchShape:
        return BatchShape(
            self.num_windows + other.num_windows,
            self.num_positions + other.num_positions,
            self.num_pairs + other.num_pairs,
            self.num_target_tokens + other.num_target_tokens,
            self.num_recomputed_windows + other.num_recomputed_windows,
        )


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward and a backward pass; `recomputed` are those of the forward pass that the backward repeats."""

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    def __mul__(self, count: float) -> Flops:
        return Flops(self.forward * count, self.backward * count, self.recomputed * count)


class TrainingFlops:
    """Counts the FLOPs of batches, for one model with its trained parameters and its activation checkpointing."""

    def __init__(self, model: TrainedVoxtral, config: ModelConfig) -> None:
        """Inspect a model, such as a `trained_meta_model`; it is not kept."""
        every = config.checkpointing
        gradient = _GradientFlow()
        encoder = _encoder(model.model.audio_tower, gradient, every.encoder)
        projector = _projector(model, gradient)
        self._recomputed_chunk = _recomputed_in_chunk(encoder, projector, model) if gradient.is_needed else 0.0
        self._window: dict[Component, Flops] = {"encoder": encoder, "projector": projector}
        self._position, self._pair = _language_model(
            model.model.language_model, gradient, every.language_model, config.mlp_chunk_tokens is not None
        )
        logits = gradient.products(model.lm_head)
        # `TargetLogits` recomputes logits in the backward pass.
        self._target = Flops(logits.forward, logits.backward, recomputed=logits.forward)

    def forward(self, shape: BatchShape) -> dict[Component, float]:
        """FLOPs of one forward pass by component; logits count to the language model."""
        components = self._by_component(shape)
        return {component: flops.forward for component, flops in components.items()}

    def model(self, shape: BatchShape) -> float:
        """Model FLOPs of a forward and backward pass; `shape` is from `BatchShape.needed`."""
        return sum(flops.forward + flops.backward for flops in self._by_component(shape).values())

    def hardware(self, shape: BatchShape) -> float:
        """Hardware FLOPs of a forward and backward pass; `shape` is from `BatchShape.computed`."""
        recomputed = sum(flops.recomputed for flops in self._by_component(shape).values())
        return self.model(shape) + recomputed + self._recomputed_chunk * shape.num_recomputed_windows

    def _by_component(self, shape: BatchShape) -> dict[Component, Flops]:
        text = (
            self._position * shape.num_positions + self._pair * shape.num_pairs + self._target * shape.num_target_tokens
        )
        windows = {component: flops * shape.num_windows for component, flops in self._window.items()}
        return {**windows, "language_model": text}


def training_flops(config: ModelConfig, trainable: TrainableConfig) -> TrainingFlops:
    """The FLOPs of a configured model, from its meta model.

    Raises:
        UserError: the path is not a Voxtral checkpoint, or the configuration does not fit it.
    """
    return TrainingFlops(trained_meta_model(config, trainable, DTYPES[config.precision]), config)


class _GradientFlow:
    """Walks modules in the order of the forward pass, and tracks whether their inputs need gradients.

    is_needed: whether a parameter so far is trained, so that the inputs of all later modules need gradients.
    """

    def __init__(self) -> None:
        self.is_needed = False

    def products(self, *layers: nn.Module) -> Flops:
        """FLOPs of layers with the same input, for one row of it; then walk past them."""
        total = sum(map(self._layer, layers), Flops())
        self.pass_by(*layers)
        return total

    def pass_by(self, *modules: nn.Module) -> None:
        """Walk past modules, which may also be modules without products, such as norms."""
        self.is_needed = self.is_needed or any(map(_is_trained, modules))

    def reaches(self, layer: nn.Module) -> bool:
        """Whether the output of a layer at this point needs a gradient."""
        return self.is_needed or _is_trained(layer)

    def _layer(self, layer: nn.Module) -> Flops:
        own = _row(_base(layer), self.is_needed)
        if not _is_adapted(layer):
            return own
        down, up = _adapter(layer)
        return own + _row(down, self.is_needed) + _row(up, self.reaches(down))


def _row(layer: Any, has_input_gradient: bool) -> Flops:
    """FLOPs of one row times the matrix of a layer."""
    return _product(_num_weights(layer), has_input_gradient, layer.weight.requires_grad)


def _product(size: int, has_first_gradient: bool, has_second_gradient: bool) -> Flops:
    """FLOPs of `size` multiplications and additions, and of the gradients of both factors."""
    forward = 2.0 * size
    return Flops(forward, forward * (has_first_gradient + has_second_gradient))


@dataclass(frozen=True)
class _Block:
    """The parts of a transformer block, by the same names for all components.

    widening: the layers of the feed-forward part that take its input.
    narrowing: the last layer of the feed-forward part.
    """

    first_norm: nn.Module
    queries: nn.Module
    keys: nn.Module
    values: nn.Module
    out: nn.Module
    second_norm: nn.Module
    widening: tuple[nn.Module, ...]
    narrowing: nn.Module

    @classmethod
    def of_encoder(cls, block: Any) -> _Block:
        attention = block.self_attn
        return cls(
            block.self_attn_layer_norm,
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.out_proj,
            block.final_layer_norm,
            (block.fc1,),
            block.fc2,
        )

    @classmethod
    def of_language_model(cls, block: Any) -> _Block:
        attention, mlp = block.self_attn, block.mlp
        return cls(
            block.input_layernorm,
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
            block.post_attention_layernorm,
            (mlp.gate_proj, mlp.up_proj),
            mlp.down_proj,
        )

    def flops(self, gradient: _GradientFlow, is_checkpointed: bool, has_mlp_chunks: bool) -> tuple[Flops, Flops]:
        """FLOPs of each row, and of each pair of rows of which one attends to the other.

        Chunks of the MLP are recomputed too; in a checkpointed block, which does not recompute its MLP then, they cost
        the same.
        """
        gradient.pass_by(self.first_norm)
        pair = self._pair(gradient)
        row = gradient.products(self.queries, self.keys, self.values) + gradient.products(self.out)
        gradient.pass_by(self.second_norm)
        mlp = gradient.products(*self.widening) + gradient.products(self.narrowing)
        row, mlp_again = row + mlp, mlp.forward - _last_product(self.narrowing)
        if not gradient.is_needed or not (is_checkpointed or has_mlp_chunks):
            return row, pair
        if not is_checkpointed:
            return Flops(row.forward, row.backward, mlp_again), pair
        recomputed = row.forward - mlp.forward + mlp_again
        return Flops(row.forward, row.backward, recomputed), Flops(pair.forward, pair.backward, pair.forward)

    def _pair(self, gradient: _GradientFlow) -> Flops:
        """FLOPs of attention scores and sums of values, of all heads, including those that share keys."""
        width = _base(self.queries).out_features
        queries, keys, values = (gradient.reaches(layer) for layer in (self.queries, self.keys, self.values))
        scores = _product(width, queries, keys)
        sums = _product(width, queries or keys, values)
        return scores + sums


def _encoder(encoder: Any, gradient: _GradientFlow, checkpoint_every: int) -> Flops:
    """FLOPs of one window in the encoder."""
    places: int = encoder.config.max_source_positions
    # The second convolution has a stride of 2, so the first has twice as many outputs.
    num_frames: int = places * encoder.conv2.stride[0]
    total = gradient.products(encoder.conv1) * num_frames
    total = total + gradient.products(encoder.conv2) * places
    gradient.pass_by(encoder.embed_positions)
    blocks = [_Block.of_encoder(block) for block in encoder.layers]
    row, pair = _blocks(blocks, gradient, checkpoint_every)
    gradient.pass_by(encoder.layer_norm)
    return total + row * places + pair * places**2


def _projector(model: TrainedVoxtral, gradient: _GradientFlow) -> Flops:
    """FLOPs of one window in the projector."""
    projector = model.model.multi_modal_projector
    row = gradient.products(projector.linear_1) + gradient.products(projector.linear_2)
    return row * audio_tokens_per_window(model.config)


def _recomputed_in_chunk(encoder: Flops, projector: Flops, model: TrainedVoxtral) -> float:
    """FLOPs that the backward pass recomputes for one window of a checkpointed chunk."""
    last = _last_product(model.model.multi_modal_projector.linear_2) * audio_tokens_per_window(model.config)
    return encoder.forward + projector.forward - last


def _language_model(
    text: Any, gradient: _GradientFlow, checkpoint_every: int, has_mlp_chunks: bool
) -> tuple[Flops, Flops]:
    """FLOPs of one position, and of one pair of positions, in all blocks of the language model."""
    gradient.pass_by(text.embed_tokens)
    blocks = [_Block.of_language_model(block) for block in text.layers]
    row, pair = _blocks(blocks, gradient, checkpoint_every, has_mlp_chunks)
    gradient.pass_by(text.norm)
    return row, pair


def _blocks(
    blocks: Sequence[_Block], gradient: _GradientFlow, checkpoint_every: int, has_mlp_chunks: bool = False
) -> tuple[Flops, Flops]:
    each = [
        block.flops(gradient, is_checkpointed(number, checkpoint_every), has_mlp_chunks)
        for number, block in enumerate(blocks)
    ]
    return sum((row for row, _ in each), Flops()), sum((pair for _, pair in each), Flops())


def _last_product(layer: Any) -> float:
    """FLOPs of a row in the last layer of a checkpoint, which torch does not recompute: the backward pass needs its
    input only."""
    last = _adapter(layer)[1] if _is_adapted(layer) else layer
    return 2.0 * _num_weights(last)


def _num_weights(layer: Any) -> int:
    """Values of a layer's matrix; a quantized one holds several in a byte."""
    return int(layer.num_weights if isinstance(layer, QuantizedLinear) else layer.weight.numel())


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _is_adapted(layer: nn.Module) -> bool:
    return hasattr(layer, "base_layer")


def _base(layer: Any) -> Any:
    """The layer itself, inside peft's adapter."""
    return layer.base_layer if _is_adapted(layer) else layer


def _adapter(layer: Any) -> tuple[Any, Any]:
    return layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]

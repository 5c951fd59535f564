"""Floating point operations of training a Voxtral: how many an update needs, and how many a device computes for it.

A product of matrices `(m, k) x (k, n)` has 2 m k n of them. Norms, activations, softmax and the optimizer are left out,
as everywhere in the literature. Per unit of a batch, a forward pass costs

    window     encoder: 2 F D (3 M) + 2 S D (3 D) of the convolutions over F = 2 S frames of M mel bins, and for each
               block S (8 D^2 + 4 D H) of its six linear layers and 4 S^2 D of its attention, where each of S places
               sees all others; projector: 2 T (I E + E^2) for T audio tokens, which are I wide
    position   language model: for each block 2 E (2 A + 2 V) + 6 E G of attention layers and SwiGLU, where A is the
               width of all queries and V that of all keys, which groups of queries share
    pair       language model: 4 A for each block, for each position and one that it sees: n (n + 1) / 2 pairs for n
               positions, because only those before it and itself are needed
    target     2 E x vocabulary: logits of other positions are never computed

with the widths D of the encoder, H of its feed-forward layers, E of the language model and G of its own. An adapter of
rank r adds 2 r (inputs + outputs) to a layer for each of its rows.

The backward pass of a product costs as much as the forward pass for the gradient of its weight, if that is trained, and
as much again for the gradient of its input, if anything that is trained lies before it. So training all weights costs
3 forward passes; adapters of the language model cost 2 of its own and 1 of the encoder, which no gradient reaches.

*Model FLOPs* (Kaplan et al., arXiv 2001.08361, section 2.1; Chowdhery et al., arXiv 2204.02311, appendix B) are those
of the mathematics: of real positions, not of padding, and of each product once. *Hardware FLOPs* (Korthikanti et al.,
arXiv 2205.05198) are those of the shapes that a device computes, and of what checkpoints compute again.

Not counted: the norms of DoRA's directions, 2 r inputs (inputs + outputs) for each layer and forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from voxtral_dist.config import Component, ModelConfig, TrainableConfig
from voxtral_dist.model.trainable import ADAPTER_NAME
from voxtral_dist.model.voxtral import (
    DTYPES,
    TrainedVoxtral,
    audio_tokens_per_window,
    is_checkpointed,
    trained_meta_model,
)


@dataclass(frozen=True)
class BatchShape:
    """What the FLOPs of examples depend on; shapes add up over micro-batches and ranks.

    num_windows: of the encoder.
    num_positions: of the language model.
    num_pairs: of positions, such that the first attends to the second.
    num_target_tokens: whose logits are computed.
    num_windows_again: of the windows, those in checkpointed passes of the encoder (`engine.encoder`).
    """

    num_windows: int = 0
    num_positions: int = 0
    num_pairs: int = 0
    num_target_tokens: int = 0
    num_windows_again: int = 0

    @classmethod
    def needed(cls, num_windows: int, positions_of_examples: Iterable[int], num_target_tokens: int) -> BatchShape:
        """Of examples without their padding: for model FLOPs. A window counts whole, as the encoder takes it."""
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
        """Of one micro-batch that is padded to `(num_examples, num_positions)`: for hardware FLOPs.

        Every position is paired with every other, as in `sdpa` with a mask; FlashAttention leaves out most of those
        that are not needed. A pass of the encoder without a window takes a silent one.
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
            self.num_windows_again + other.num_windows_again,
        )


@dataclass(frozen=True)
class Flops:
    """FLOPs of something. again: of its forward pass, what is computed a second time in the backward pass."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.again + other.again)

    def __mul__(self, count: float) -> Flops:
        return Flops(self.forward * count, self.backward * count, self.again * count)


class TrainingFlops:
    """FLOPs of batches under one model and one choice of what is trained and what is computed again."""

    def __init__(self, model: TrainedVoxtral, config: ModelConfig) -> None:
        """Look through a model that may be on the meta device, as `trained_meta_model` makes it; nothing is kept."""
        every = config.activation_checkpointing
        gradient = _GradientFlow()
        encoder = _encoder(model.model.audio_tower, gradient, every.encoder)
        projector = _projector(model, gradient)
        self._encoder_again = _chunk_again(encoder, projector, model) if gradient.is_needed else 0.0
        self._window: dict[Component, Flops] = {"encoder": encoder, "projector": projector}
        self._position, self._pair = _language_model(model.model.language_model, gradient, every.language_model)
        logits = gradient.products(model.lm_head)
        # `TargetLogits` never keeps logits.
        self._target = Flops(logits.forward, logits.backward, again=logits.forward)

    def forward(self, shape: BatchShape) -> dict[Component, float]:
        """FLOPs of one forward pass by component; logits belong to the language model."""
        components = self._by_component(shape)
        return {component: flops.forward for component, flops in components.items()}

    def model(self, shape: BatchShape) -> float:
        """FLOPs that forward and backward pass need, each product once; `shape` is that of `BatchShape.needed`."""
        return sum(flops.forward + flops.backward for flops in self._by_component(shape).values())

    def hardware(self, shape: BatchShape) -> float:
        """FLOPs with all that is computed again; `shape` is that of `BatchShape.computed`."""
        again = sum(flops.again for flops in self._by_component(shape).values())
        return self.model(shape) + again + self._encoder_again * shape.num_windows_again

    def _by_component(self, shape: BatchShape) -> dict[Component, Flops]:
        text = (
            self._position * shape.num_positions + self._pair * shape.num_pairs + self._target * shape.num_target_tokens
        )
        windows = {component: flops * shape.num_windows for component, flops in self._window.items()}
        return {**windows, "language_model": text}


def training_flops(config: ModelConfig, trainable: TrainableConfig) -> TrainingFlops:
    """The FLOPs of a configured model, from its modules on the meta device.

    Raises:
        UserError: the path leads to no Voxtral, or the configuration does not fit it.
    """
    return TrainingFlops(trained_meta_model(config, trainable, DTYPES[config.precision]), config)


class _GradientFlow:
    """Modules in the order of the forward pass, and whether a gradient has to reach what they are given.

    is_needed: whether anything that was passed by is trained; then all that follows has a gradient to hand back.
    """

    def __init__(self) -> None:
        self.is_needed = False

    def products(self, *layers: nn.Module) -> Flops:
        """FLOPs of layers that take the same input, for one row of it; they are passed by together."""
        total = sum(map(self._layer, layers), Flops())
        self.pass_by(*layers)
        return total

    def pass_by(self, *modules: nn.Module) -> None:
        """Go on behind modules; those without products, such as norms, may be trained too."""
        self.is_needed = self.is_needed or any(map(_is_trained, modules))

    def reaches(self, layer: nn.Module) -> bool:
        """Whether the output of a layer that takes this place's input has a gradient."""
        return self.is_needed or _is_trained(layer)

    def _layer(self, layer: nn.Module) -> Flops:
        own = _row(_base(layer), self.is_needed)
        if not _is_adapted(layer):
            return own
        down, up = _adapter(layer)
        return own + _row(down, self.is_needed) + _row(up, self.reaches(down))


def _row(layer: Any, has_input_gradient: bool) -> Flops:
    """Of a row with the matrix of a layer."""
    return _product(layer.weight.numel(), has_input_gradient, layer.weight.requires_grad)


def _product(size: int, has_first_gradient: bool, has_second_gradient: bool) -> Flops:
    """Of `size` pairs of numbers that are multiplied and added up, and of the gradients of both factors."""
    forward = 2.0 * size
    return Flops(forward, forward * (has_first_gradient + has_second_gradient))


@dataclass(frozen=True)
class _Block:
    """The parts of a transformer block, whatever a component calls them.

    narrowing: the last product, and the only one of the feed-forward part that does not take its input.
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

    def flops(self, gradient: _GradientFlow, is_checkpointed: bool) -> tuple[Flops, Flops]:
        """For each row, and for each pair of rows of which one attends to the other."""
        gradient.pass_by(self.first_norm)
        pair = self._pair(gradient)
        row = gradient.products(self.queries, self.keys, self.values) + gradient.products(self.out)
        gradient.pass_by(self.second_norm)
        row = row + gradient.products(*self.widening) + gradient.products(self.narrowing)
        if not (is_checkpointed and gradient.is_needed):
            return row, pair
        again = row.forward - _last_product(self.narrowing)
        return Flops(row.forward, row.backward, again), Flops(pair.forward, pair.backward, pair.forward)

    def _pair(self, gradient: _GradientFlow) -> Flops:
        """Scores, and sums of values: of all heads, also where some share their keys."""
        width = _base(self.queries).out_features
        queries, keys, values = (gradient.reaches(layer) for layer in (self.queries, self.keys, self.values))
        scores = _product(width, queries, keys)
        sums = _product(width, queries or keys, values)
        return scores + sums


def _encoder(encoder: Any, gradient: _GradientFlow, checkpoint_every: int) -> Flops:
    """Of one window."""
    places: int = encoder.config.max_source_positions
    # The second convolution has a stride of 2: the first sees twice as many places.
    num_frames: int = places * encoder.conv2.stride[0]
    total = gradient.products(encoder.conv1) * num_frames
    total = total + gradient.products(encoder.conv2) * places
    gradient.pass_by(encoder.embed_positions)
    blocks = [_Block.of_encoder(block) for block in encoder.layers]
    row, pair = _blocks(blocks, gradient, checkpoint_every)
    gradient.pass_by(encoder.layer_norm)
    return total + row * places + pair * places**2


def _projector(model: TrainedVoxtral, gradient: _GradientFlow) -> Flops:
    """Of one window."""
    projector = model.model.multi_modal_projector
    row = gradient.products(projector.linear_1) + gradient.products(projector.linear_2)
    return row * audio_tokens_per_window(model.config)


def _chunk_again(encoder: Flops, projector: Flops, model: TrainedVoxtral) -> float:
    """Of one window, in the backward pass of a checkpointed pass of the encoder."""
    last = _last_product(model.model.multi_modal_projector.linear_2) * audio_tokens_per_window(model.config)
    return encoder.forward + projector.forward - last


def _language_model(text: Any, gradient: _GradientFlow, checkpoint_every: int) -> tuple[Flops, Flops]:
    """Of one position, and of one pair of positions."""
    gradient.pass_by(text.embed_tokens)
    blocks = [_Block.of_language_model(block) for block in text.layers]
    row, pair = _blocks(blocks, gradient, checkpoint_every)
    gradient.pass_by(text.norm)
    return row, pair


def _blocks(blocks: Sequence[_Block], gradient: _GradientFlow, checkpoint_every: int) -> tuple[Flops, Flops]:
    each = [block.flops(gradient, is_checkpointed(number, checkpoint_every)) for number, block in enumerate(blocks)]
    return sum((row for row, _ in each), Flops()), sum((pair for _, pair in each), Flops())


def _last_product(layer: Any) -> float:
    """Of a row: torch stops computing a checkpoint again where it has the last input that the backward pass needs."""
    last = _adapter(layer)[1] if _is_adapted(layer) else layer
    num_weights: int = last.weight.numel()
    return 2.0 * num_weights


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _is_adapted(layer: nn.Module) -> bool:
    return hasattr(layer, "base_layer")


def _base(layer: Any) -> Any:
    """The layer itself, which peft puts an adapter around."""
    return layer.base_layer if _is_adapted(layer) else layer


def _adapter(layer: Any) -> tuple[Any, Any]:
    return layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]

"""Memory of the activations of one micro-batch, part by part, from what the backward pass keeps.

What autograd keeps follows from the modules' code: a linear layer keeps its input if its weight is trained, a norm its
input, an activation function its input, a product both factors, attention its queries, keys, values and output and one
logarithm of a sum per query (Dao, arXiv 2307.08691: no scores). Korthikanti et al. (arXiv 2205.05198) count the same
for GPT; this is for Voxtral's blocks as transformers implements them. Tests compare each block with what
`saved_tensors_hooks` sees.

    C windows   S positions of a window   D width of the encoder (its feed-forward layers are 4 D wide)   M mel bins
    B examples   T positions of an example   E width of the language model   G of its feed-forward layers
    Q width of all queries, K of all keys   V vocabulary   N targets   s bytes of a value in the model's precision

A checkpointed block keeps only its input; the rest is recomputed, one block at a time, in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from voxtral_dist.config import ModelConfig
from voxtral_dist.estimate.parts import Part, backward_peak, block_part, forward_peak, plain_part
from voxtral_dist.model.blocks import blocks_of, is_checkpointed
from voxtral_dist.model.encoder import num_chunks
from voxtral_dist.model.trainable import ADAPTER_NAME
from voxtral_dist.model.voxtral import TrainedVoxtral, audio_tokens_per_window

_FLOAT32_BYTES = 4
_INDEX_BYTES = 8
EMBEDDINGS = "embeddings"
# Of a value of a factor that is cast to float8 by single kernels: scaled and clamped in float32, and the result.
_UNCOMPILED_CAST = 9


@dataclass(frozen=True)
class MicroBatchShape:
    """The sizes that activations of a micro-batch depend on.

    num_windows: C. num_examples: B. num_positions: T, with padding. num_target_tokens: N, of all examples.
    """

    num_windows: int
    num_examples: int
    num_positions: int
    num_target_tokens: int


@dataclass(frozen=True)
class _Kind:
    """What blocks have in common that have the same parts; number: of the first of them."""

    number: int
    is_trained: bool


class Activations:
    """The parts of one model, given what is trained, what is checkpointed and how attention is computed."""

    def __init__(self, model: TrainedVoxtral, config: ModelConfig) -> None:
        """Take a model, which may be on the meta device; the configuration says which attention it has."""
        self._model = model
        self._config = config
        self._itemsize = model.lm_head.weight.element_size()
        self._audio_tokens = audio_tokens_per_window(model.config)
        # `auto` may find FlashAttention, which keeps less.
        self._attention = "sdpa" if config.attention == "auto" else config.attention
        self._kinds = _kinds_of_blocks(model)

    def with_config(self, config: ModelConfig) -> Activations:
        """Activations of the same model, with another `activation_checkpointing`."""
        other = copy(self)
        other._config = config
        return other

    def parts(self, shape: MicroBatchShape) -> list[Part]:
        """Encoder and projector, embeddings, blocks of the language model, and the loss: see `TrainedVoxtral.forward`.

        So the backward pass reaches the embeddings before the encoder, which it computes beside their gradient.
        """
        embeddings, encoder = self._embeddings(shape), self._encoder_in_chunks(shape)
        is_reached = any(part.num_trained for part in [embeddings, *encoder])
        return [*encoder, embeddings, *self._language_model(shape, is_reached)]

    def _encoder_in_chunks(self, shape: MicroBatchShape) -> list[Part]:
        """The parts of an encoder that takes all windows at once; else one part, of chunks that are each recomputed.

        Between forward and backward pass, chunks keep 4 C M 2 S bytes of features and C E S / 4 embeddings.
        """
        count = num_chunks(shape.num_windows, self._config.encoder_windows_per_chunk)
        inside = self.encoder(-(-shape.num_windows // count))
        if count == 1:
            return inside
        trained = sum(part.num_trained for part in inside)
        positions = self._audio_config.max_source_positions
        kept = shape.num_windows * (
            2 * positions * self._audio_config.num_mel_bins * _FLOAT32_BYTES
            + self._audio_tokens * self._text_config.hidden_size * self._itemsize
        )
        once = max(forward_peak(inside), backward_peak(inside))
        return [
            Part(
                "encoder chunks",
                kept if trained else 0.0,
                again=once if trained else 0.0,
                passing=max(part.passing for part in inside),
                num_trained=trained,
                num_frozen=sum(part.num_frozen for part in inside),
                # Gradients of the first chunk exist while the second is recomputed.
                num_widest=trained,
                num_gathered=max(part.num_values for part in inside),
                largest=max(part.largest for part in inside),
            )
        ]

    def encoder(self, num_windows: int) -> list[Part]:
        """Convolutions, blocks and projector, for windows that the encoder takes at once.

        Convolutions keep features, 2 S M s, and input and output of both GELUs except the last output:
        (2 D 2 S + D S) s. The last norm and the projector keep 2 D S + 2 E S / 4 values.
        """
        tower, size = self._model.model.audio_tower, self._itemsize
        width, positions = self._audio_config.hidden_size, self._audio_config.max_source_positions
        front_modules = [tower.conv1, tower.conv2, tower.embed_positions]
        reached = _is_trained(*front_modules)
        front = num_windows * positions * (5 * width + 2 * self._audio_config.num_mel_bins) * size
        passing = num_windows * positions * width * 6 * size
        parts = [plain_part("encoder convolutions", front_modules, front if reached else 0.0, passing=passing)]
        every = self._config.checkpointing.encoder
        blocks, reached = self._blocks(tower.layers, every, reached, partial(self._encoder_block, num_windows))
        parts += blocks
        end_modules = [tower.layer_norm, self._model.model.multi_modal_projector]
        reached = reached or _is_trained(*end_modules)
        audio_tokens = num_windows * self._audio_tokens * self._text_config.hidden_size
        end = (2 * num_windows * positions * width + 2 * audio_tokens) * size
        working, passing = 2 * audio_tokens * size, audio_tokens * size
        return [*parts, plain_part("projector", end_modules, end if reached else 0.0, working, passing)]

    def _encoder_block(self, num_windows: int, block: Any, reached: bool, checkpointed: bool) -> Part:
        """Both residual inputs, q, k, v, the output of attention, and the input of the GELU: 11 D values a position;
        and if the layer that reads them is trained, outputs of both norms, of the joined heads, and of the GELU: 6 D.

        The backward pass adds gradients of both sides of the GELU and two of the residual while the GELU's output is
        freed: 6 D.
        """
        attention, width, size = block.self_attn, self._audio_config.hidden_size, self._itemsize
        ffn = self._audio_config.intermediate_size
        places = num_windows * self._audio_config.max_source_positions
        # `sdpa` keeps the product with values, `eager` does not.
        values = (5 if self._attention == "eager" else 6) * width + ffn
        values += width * _is_trained(attention.q_proj, attention.k_proj, attention.v_proj)
        values += (
            width * _is_trained(attention.out_proj) + width * _is_trained(block.fc1) + ffn * _is_trained(block.fc2)
        )
        values += _adapter_values(block)
        heads = self._audio_config.num_attention_heads
        scores = self._scores(heads, places, self._audio_config.max_source_positions, size)
        # Each of two norms keeps a mean and a deviation.
        kept = places * (values * size + 4 * _FLOAT32_BYTES) + scores
        working = places * (2 * width + ffn) * size
        passing = places * (2 * width + 2 * ffn) * size
        boundary = places * width * size
        return block_part("encoder block", block, reached, checkpointed, kept, boundary, working, passing, size)

    def _embeddings(self, shape: MicroBatchShape) -> Part:
        """Token ids, places of audio tokens, and cosines and sines of rotary embeddings."""
        places = shape.num_examples * shape.num_positions
        indices = (places + shape.num_windows * self._audio_tokens) * _INDEX_BYTES
        kept = indices + 2 * shape.num_positions * self._head_dim * self._itemsize
        gradient = places * self._text_config.hidden_size * self._itemsize
        embedding = self._model.model.language_model.embed_tokens
        return plain_part(EMBEDDINGS, [embedding], kept, passing=gradient, leaving=gradient)

    def _language_model(self, shape: MicroBatchShape, reached: bool) -> list[Part]:
        language = self._model.model.language_model
        every = self._config.checkpointing.language_model
        blocks, reached = self._blocks(language.layers, every, reached, partial(self._language_block, shape))
        return [*blocks, self._loss(shape, reached or _is_trained(language.norm))]

    def _blocks(
        self, blocks: Iterable[nn.Module], every: int, reached: bool, part: Callable[[Any, bool, bool], Part]
    ) -> tuple[list[Part], bool]:
        """The parts of a stack of blocks, computed once for all that are alike.

        Args:
            blocks: from the first one on.
            every: see `is_checkpointed`.
            reached: whether the backward pass goes on before them.
            part: computes a part from a block, whether the backward pass reaches it, and whether it is checkpointed.

        Returns:
            The parts, and whether the backward pass reaches what follows.
        """
        known: dict[tuple[_Kind, bool, bool], Part] = {}
        parts = []
        for number, block in enumerate(blocks):
            kind = self._kinds[block]
            reached = reached or kind.is_trained
            key = (kind, reached, is_checkpointed(number, every))
            if key not in known:
                known[key] = part(block, *key[1:])
            parts.append(known[key])
        return parts, reached

    def _language_block(self, shape: MicroBatchShape, block: Any, reached: bool, checkpointed: bool) -> Part:
        """Both norms in float32, q, k, v and output of attention, both factors of SwiGLU and the input of SiLU:
        2 x 4 E bytes and 2 Q + 2 K + 3 G values; if the layer that reads them is trained, 2 x 2 E of the norms and G.

        `eager` attention repeats keys and values for each query: 2 Q instead of 2 K. The backward pass adds gradients
        of the product, both factors and two of the residual while the product is freed: 2 G + 2 E.
        """
        attention, size = block.self_attn, self._itemsize
        places, width = shape.num_examples * shape.num_positions, self._text_config.hidden_size
        queries, ffn = self._queries, self._text_config.intermediate_size
        keys = queries if self._attention == "eager" else self._keys
        values = 2 * queries + 2 * keys + _adapter_values(attention)
        values += width * _is_trained(attention.q_proj, attention.k_proj, attention.v_proj)
        kept = places * (values * size + self._norm_bytes(block.input_layernorm))
        # `eager` takes the softmax in float32, and multiplies with a copy in the model's precision.
        softmax = _FLOAT32_BYTES + size * (size < _FLOAT32_BYTES)
        kept += self._scores(self._text_config.num_attention_heads, places, shape.num_positions, softmax)
        boundary = places * width * size
        chunk = self._places_of_chunk(places)
        mlp_kept = chunk * self._mlp_bytes(block)
        working = (chunk * 2 * ffn + places * 2 * width) * size
        passing = (places * 2 * width + chunk * 3 * ffn) * size
        float8 = self._float8_bytes(block, max(chunk * ffn, places * queries))
        if chunk < places:
            # The inputs of chunks, whose values are recomputed one chunk at a time, and the outputs that are joined.
            kept, working, passing = kept + boundary, working + mlp_kept, passing + boundary
            working = max(working, places * (2 * queries + 2 * keys + 2 * width) * size)
        else:
            kept += mlp_kept
        return block_part(
            "language block",
            block,
            reached,
            checkpointed,
            kept,
            boundary,
            working + float8,
            passing + float8,
            size,
            is_offloaded=self._config.activation_offloading,
        )

    def _float8_bytes(self, block: Any, num_values: int) -> float:
        """Bytes of the factors of a product in float8: one of `num_values`, and a matrix of a block.

        Compiled casts make a byte of each value. Uncompiled ones make, of one factor after the other, two float32
        copies first; emulated products have copies of both in float32, and a result. Tests count the latter two.
        """
        if self._config.float8 is None:
            return 0.0
        matrix = max(int(one.numel()) for one in block.parameters())
        if self._config.float8 == "rowwise_emulated":
            return max(_UNCOMPILED_CAST * num_values + 2 * _FLOAT32_BYTES * matrix, _UNCOMPILED_CAST * matrix)
        if self._config.compile_blocks is not False:
            return num_values + matrix
        return max(_UNCOMPILED_CAST * num_values, num_values + _UNCOMPILED_CAST * matrix)

    def _mlp_bytes(self, block: Any) -> float:
        """Bytes that the second half of a block of the language model keeps of a position."""
        mlp, width, ffn = block.mlp, self._text_width, int(self._text_config.intermediate_size)
        values = 3 * ffn + ffn * _is_trained(mlp.down_proj) + _adapter_values(mlp)
        values += width * _is_trained(mlp.gate_proj, mlp.up_proj)
        return values * self._itemsize + self._norm_bytes(block.post_attention_layernorm)

    def _norm_bytes(self, norm: nn.Module) -> float:
        """Bytes that a norm of the language model keeps of a position."""
        width = self._text_width
        return (width + 1) * _FLOAT32_BYTES + width * self._itemsize * _is_trained(norm)

    def _places_of_chunk(self, places: int) -> int:
        """Positions for which the MLP is computed at a time."""
        tokens = self._config.mlp_chunk_tokens
        return places if tokens is None else -(-places // num_chunks(places, tokens))

    def _scores(self, heads: int, places: int, length: int, size: int) -> float:
        """A logarithm for each head and query; `eager` attention keeps probabilities of `size` bytes for each pair."""
        if self._attention == "eager":
            return places * heads * length * size
        return places * heads * _FLOAT32_BYTES

    def _loss(self, shape: MicroBatchShape, reached: bool) -> Part:
        """The last norm of all positions, and the states of N targets; logits are recomputed chunk by chunk.

        Logits of a chunk of n targets and their log-probabilities are 8 n V bytes. The backward pass holds three
        float32 tensors of n V: log-probabilities, their gradient, and that of the logits. Beside the gradient of the
        weight, which is added to that of earlier chunks, it holds the latter in the model's precision. The norm's
        backward pass holds three float32 tensors of its input's size.
        """
        width, size = self._text_config.hidden_size, self._itemsize
        head, last_norm = self._model.lm_head, self._model.model.language_model.norm
        places = shape.num_examples * shape.num_positions
        norm = places * (width * _FLOAT32_BYTES + width * size * _is_trained(last_norm))
        chunk = min(self._config.loss_chunk_tokens, shape.num_target_tokens)
        logits = chunk * head.weight.shape[0]
        is_added = shape.num_target_tokens > chunk and _is_trained(head)
        added = head.weight.numel() * size if is_added else 0.0
        kept = norm + shape.num_target_tokens * width * size
        return plain_part(
            "loss",
            [last_norm, head],
            kept if reached or _is_trained(last_norm, head) else 0.0,
            working=3 * logits * _FLOAT32_BYTES,
            passing=2 * logits * _FLOAT32_BYTES,
            leaving=norm + max(3 * places * width * _FLOAT32_BYTES, logits * size + added),
            num_widest=head.weight.numel() if is_added else 0,
        )

    @property
    def _audio_config(self) -> Any:
        return self._model.config.audio_config

    @property
    def _text_config(self) -> Any:
        return self._model.config.text_config

    @property
    def _text_width(self) -> int:
        return int(self._text_config.hidden_size)

    @property
    def _head_dim(self) -> int:
        return int(self._text_config.head_dim)

    @property
    def _queries(self) -> int:
        return int(self._text_config.num_attention_heads) * self._head_dim

    @property
    def _keys(self) -> int:
        return int(self._text_config.num_key_value_heads) * self._head_dim


def _kinds_of_blocks(model: TrainedVoxtral) -> dict[nn.Module, _Kind]:
    """The kind of each block: walking through the modules of all for each estimate would take most of its time."""
    kinds: dict[Any, _Kind] = {}
    found: dict[nn.Module, _Kind] = {}
    for blocks in blocks_of(model).values():
        for block in blocks:
            modules = tuple((name, type(one)) for name, one in block.named_modules())
            parameters = tuple((one.shape, one.dtype, one.requires_grad) for one in block.parameters())
            found[block] = kinds.setdefault((modules, parameters), _Kind(len(found), _is_trained(block)))
    return found


def _is_trained(*modules: nn.Module) -> bool:
    return any(one.requires_grad for module in modules for one in module.parameters())


def _adapter_values(block: nn.Module) -> int:
    """Values that adapters keep per position: r between their matrices; with dropout their input; with DoRA the
    outputs of both branches.
    """
    values = 0
    for module in block.modules():
        ranks = getattr(module, "r", None)
        if not isinstance(ranks, dict) or ADAPTER_NAME not in ranks:
            continue
        layer: Any = module
        values += int(ranks[ADAPTER_NAME])
        if not isinstance(layer.lora_dropout[ADAPTER_NAME], nn.Identity):
            values += 2 * int(layer.in_features)
        if layer.use_dora[ADAPTER_NAME]:
            values += 2 * int(layer.out_features)
    return values

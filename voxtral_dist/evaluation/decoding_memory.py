"""The memory that decoding takes besides the weights: one formula for `voxtral-dist plan` and for evaluations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from transformers import VoxtralConfig

from voxtral_dist.config import EvaluationConfig, ModelConfig
from voxtral_dist.evaluation.batch_decoder import GROUPS_PER_BATCH
from voxtral_dist.evaluation.continuous_decoder import LOSS_CHUNK_TOKENS, room_for, rounded_size, rows_for
from voxtral_dist.model.features import spectrum_bytes
from voxtral_dist.model.voxtral import DTYPES, FRAMES_PER_POSITION, audio_tokens_per_window, window_samples

_INT16_BYTES, _FLOAT32_BYTES, _INDEX_BYTES = 2, 4, 8


@dataclass(frozen=True)
class DecodingShape:
    """The sizes of a batch that a rank decodes.

    num_examples, num_windows: of the whole batch. num_prompt_tokens: audio tokens included, of the longest example, and
    so are num_new_tokens, the limit of its hypothesis, and num_target_tokens, of its reference.
    """

    num_examples: int
    num_windows: int
    num_prompt_tokens: int
    num_new_tokens: int
    num_target_tokens: int


class DecodingMemory:
    """Peak memory of a `BatchDecoder`, for one model and one way to decode.

        C windows   c that the encoder takes at a time   S positions of a window   M mel bins   A its audio tokens
        D width of the encoder, F of its feed-forward layers   B examples   R = B times the number of beams
        E width of the language model, G of its feed-forward layers, K of its keys, L its blocks, V its vocabulary
        T tokens of a prompt   n new tokens   N targets of an example   s bytes of a value in the model's precision

    A batch holds int16 audio, float32 features and the embeddings of its audio tokens until its end:

        C (2 * 320 S + 4 * 2 S M + s A E)

    Beam searches, and ranks in lockstep, decode batch by batch. To what a batch holds comes the largest of the phases,
    which follow each other:

        features     32 bytes a sample of the clips that are transformed together (`model.features`)
        encoder      s c S (4 D + 2 F): a block holds its input, that of the encoder, two residuals, and both sides of
                     its GELU
        embeddings   (24 + 2 s) (R / B) C A E + 2 s R T E: transformers makes three indices for each value it replaces
        loss         the larger of s B (T + N) (4 E + 3 G), a block as below, and 3 s B (T + N) E + 8 n V: logits and
                     their log-probabilities, both float32, of n = min(B N, 2048) targets
        prompt       s R T 2 K L + s R T (4 E + 3 G) + s R T T: keys and values, a block, the mask; a block holds its
                     input, the embeddings, a residual, its normalized copy, and gate, up and product of SwiGLU
        last token   s R (T + n) K (2 L + 1) + (s + 12) R V: keys and values of a block are copied one after the other
                     to append a token; logits, and their float32 scores three times

    A static cache has all its positions, a rounded number, from the first token on, and the mask of the prompt covers
    them.

    Greedy decoding with whole weights has a cache of R' = min(`batch_size`, `max_windows` / windows of an utterance)
    rows for the longest utterance, rounded up: s R' (T + n) 2 K L. To this comes the largest phase of a quarter of a
    batch, which enters with its targets if the loss is measured; or a token of all rows, s R' V.

    Attention weights of `model.attention: eager` are not counted.
    """

    def __init__(
        self, voxtral: VoxtralConfig, model: ModelConfig, settings: EvaluationConfig, device_type: str
    ) -> None:
        """Take the sizes of a checkpoint, the sections of a configuration, and the device's type in torch."""
        self._text = voxtral.text_config
        self._audio = voxtral.audio_config
        self._audio_tokens = audio_tokens_per_window(voxtral)
        self._window_samples = window_samples(voxtral)
        self._itemsize = DTYPES[model.precision].itemsize
        self._windows_per_chunk = model.encoder_windows_per_chunk
        self._num_beams = settings.num_beams
        self._max_rows = settings.batch_size
        self._max_windows = settings.max_windows
        self._static_cache = settings.static_cache and settings.num_beams > 1
        self._measures_loss = settings.measures_loss
        self._device_type = device_type

    def peak_bytes(self, shapes: Iterable[DecodingShape]) -> int:
        """Bytes at the peak of decoding some batches, in lockstep or not; 0 without any."""
        shapes = list(shapes)
        batch_by_batch = max(map(self.batch_bytes, shapes), default=0)
        if self._num_beams > 1:
            return batch_by_batch
        # A group may enter the cache that was made for longer utterances.
        cache = max(map(self.cache_bytes, shapes), default=0)
        entering = max((max(self.row_phases(shape).values()) for shape in shapes), default=0)
        return max(batch_by_batch, cache + entering)

    def batch_bytes(self, shape: DecodingShape) -> int:
        """Bytes at the peak of a batch that `generate` decodes."""
        return self._held(shape) + max(self.phases(shape).values())

    def cache_bytes(self, shape: DecodingShape) -> int:
        """Bytes of the cache of continuous batching for utterances such as those of a batch."""
        cached = self._num_cache_rows(shape) * room_for(shape.num_prompt_tokens + shape.num_new_tokens)
        return self._keys(cached, 2 * self._text.num_hidden_layers)

    def row_phases(self, shape: DecodingShape) -> dict[str, int]:
        """Bytes of each phase of a group that enters the cache, and of a token, besides the cache."""
        num_examples = -(-shape.num_examples // GROUPS_PER_BATCH)
        num_windows = -(-shape.num_windows * num_examples // shape.num_examples)
        group = replace(shape, num_examples=num_examples, num_windows=num_windows)
        held, features = self._held(group), self._features_of(group)
        # Features are freed when their windows are encoded.
        entering = held - features + self._block(num_examples * self._entering_tokens(shape))
        phases = {
            "features": held + self._features(group),
            "encoder": held + self._encoder(group),
            "prompt": entering,
            "token": self._num_cache_rows(shape) * self._text.vocab_size * self._itemsize,
        }
        return phases | ({"loss": held - features + self._loss(group)} if self._measures_loss else {})

    def _num_cache_rows(self, shape: DecodingShape) -> int:
        return rows_for(-(-shape.num_windows // shape.num_examples), self._max_rows, self._max_windows)

    def _entering_tokens(self, shape: DecodingShape) -> int:
        return shape.num_prompt_tokens + (shape.num_target_tokens if self._measures_loss else 0)

    def phases(self, shape: DecodingShape) -> dict[str, int]:
        """Bytes of each phase of a batch, besides what the batch holds."""
        phases = {
            "features": self._features(shape),
            "encoder": self._encoder(shape),
            "embeddings": self._embeddings(shape),
            "prompt": self._prompt(shape),
            "last token": self._last_token(shape),
        }
        return phases | ({"loss": self._loss(shape)} if self._measures_loss else {})

    def _held(self, shape: DecodingShape) -> int:
        embeddings = self._audio_tokens * int(self._text.hidden_size) * self._itemsize
        others = shape.num_windows * (self._window_samples * _INT16_BYTES + embeddings)
        return others + self._features_of(shape)

    def _features_of(self, shape: DecodingShape) -> int:
        frames = FRAMES_PER_POSITION * int(self._audio.max_source_positions)
        return shape.num_windows * frames * int(self._audio.num_mel_bins) * _FLOAT32_BYTES

    def _features(self, shape: DecodingShape) -> int:
        mean_samples = shape.num_windows * self._window_samples // shape.num_examples
        return spectrum_bytes(shape.num_windows * self._window_samples, mean_samples, self._device_type)

    def _encoder(self, shape: DecodingShape) -> int:
        windows = min(shape.num_windows, self._windows_per_chunk)
        width = 4 * self._audio.hidden_size + 2 * self._audio.intermediate_size
        return int(windows * self._audio.max_source_positions * width * self._itemsize)

    def _embeddings(self, shape: DecodingShape) -> int:
        audio_values = self._num_beams * shape.num_windows * self._audio_tokens * self._text.hidden_size
        values = self._rows(shape) * shape.num_prompt_tokens * self._text.hidden_size
        return int(audio_values * (3 * _INDEX_BYTES + 2 * self._itemsize) + 2 * values * self._itemsize)

    def _loss(self, shape: DecodingShape) -> int:
        positions = shape.num_examples * (shape.num_prompt_tokens + shape.num_target_tokens)
        num_targets = min(shape.num_examples * shape.num_target_tokens, LOSS_CHUNK_TOKENS)
        logits = 2 * num_targets * self._text.vocab_size * _FLOAT32_BYTES
        return max(self._block(positions), int(3 * positions * self._text.hidden_size * self._itemsize + logits))

    def _prompt(self, shape: DecodingShape) -> int:
        rows, cached = self._rows(shape), shape.num_prompt_tokens
        if self._static_cache:
            cached = rounded_size(cached + shape.num_new_tokens)
        positions = rows * shape.num_prompt_tokens
        mask = positions * cached * self._itemsize
        return self._keys(rows * cached, 2 * self._text.num_hidden_layers) + self._block(positions) + mask

    def _last_token(self, shape: DecodingShape) -> int:
        rows, cached = self._rows(shape), shape.num_prompt_tokens + shape.num_new_tokens
        if self._static_cache:
            cached = rounded_size(cached)
        scores = rows * self._text.vocab_size * (self._itemsize + 3 * _FLOAT32_BYTES)
        return self._keys(rows * cached, 2 * self._text.num_hidden_layers + 1) + int(scores)

    def _block(self, positions: int) -> int:
        """One block of the language model in a forward pass without gradients."""
        return int(positions * (4 * self._text.hidden_size + 3 * self._text.intermediate_size) * self._itemsize)

    def _keys(self, positions: int, num_tensors: int) -> int:
        """Tensors of keys, or of values, which are as large."""
        width = self._text.num_key_value_heads * self._text.head_dim
        return int(positions * width * num_tensors * self._itemsize)

    def _rows(self, shape: DecodingShape) -> int:
        return shape.num_examples * self._num_beams

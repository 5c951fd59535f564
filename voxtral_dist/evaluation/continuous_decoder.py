"""Greedy decoding with continuous batching: an utterance that has ended leaves its row, and another one enters.

Utterances come in groups. A group is encoded as one batch, and enters as one batch when enough rows are free: one
forward pass over prompts and targets fills its rows of the cache, chooses the first tokens, and gives the loss. Then
all rows advance by one token at a time.

The rows in use are always the first ones, so that a step computes nothing else. On a CPU, a step attends to as many
positions as the longest row has. On a GPU, both numbers are rounded up to few sizes, and a step that recurs is replayed
as a CUDA graph: launching its kernels one by one takes the host about ten times as long as they take the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.micro_batch import MicroBatch, collate
from voxtral_dist.model.attention import masked_attention, without_cudnn
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.row_cache import RowCache
from voxtral_dist.model.voxtral import TrainedVoxtral

# Target tokens whose logits are computed at a time.
LOSS_CHUNK_TOKENS = 2048
# Positions of a row are a multiple of this, which attention kernels like.
_POSITIONS_MULTIPLE = 64

# Makes a function that does again what a step does, with the same tensors.
Record = Callable[[Callable[[], None]], Callable[[], None]]


@dataclass(frozen=True)
class Progress:
    """What a forward pass brought: token ids of utterances that ended, and the summed loss of a group's targets."""

    ended: list[tuple[Example, list[int]]]
    loss_sum: float = 0.0
    num_target_tokens: int = 0


@dataclass
class _Running:
    """An utterance in a row: its tokens so far, of which the last one comes next at `position`."""

    example: Example
    limit: int
    position: int
    ids: list[int] = field(default_factory=list)


class ContinuousDecoder:
    """Decodes groups of examples greedily in the rows of one cache."""

    def __init__(
        self,
        model: TrainedVoxtral,
        prompts: VoxtralPrompts,
        log_mel: LogMel,
        limit: Callable[[Example], int],
        max_rows: int,
        max_windows: int,
        record: Record | None = None,
    ) -> None:
        """A decoder without a cache yet.

        Args:
            model: in evaluation mode, with whole weights.
            prompts: of the model.
            log_mel: features of the model.
            limit: the most tokens of an example.
            max_rows: utterances that are decoded at a time.
            max_windows: windows of the utterances that are decoded at a time; one with more is decoded alone.
            record: makes replays of steps; None for CUDA graphs on a GPU, and no replays elsewhere.
        """
        self._model = model
        self._prompts = prompts
        self._log_mel = log_mel
        self._limit = limit
        self._max_rows = max_rows
        self._max_windows = max_windows
        self._record = record or cuda_graphs(log_mel.device)
        self._running: list[_Running] = []
        self._cache: RowCache | None = None
        self._replays: dict[tuple[int, int], Callable[[], None] | None] = {}

    @torch.no_grad()
    def __call__(self, groups: Iterable[Sequence[Example]], *, with_loss: bool) -> Iterator[Progress]:
        """Decode all groups; each example ends once, in any order.

        Args:
            groups: at least one example each; the next one is taken when there are rows for as many as in the one
                before it.
            with_loss: measure the loss of targets too, in the same forward pass.
        """
        # A call that was not used up leaves its utterances.
        self._running.clear()
        if self._model.mlp_chunks is not None:
            # Not as many as the last step of training had.
            self._model.mlp_chunks.num_chunks = None
        for group in groups:
            while not self._has_room(group):
                yield self._step()
            yield self._enter(group, with_loss)
            # Until another group may have room, it is left to other ranks.
            while self._running and self._num_free < len(group):
                yield self._step()
        while self._running:
            yield self._step()

    def _collate(self, group: Sequence[Example], with_loss: bool) -> MicroBatch:
        """A batch whose first target place of each example is the last position of its prompt."""
        if not with_loss:
            group = [replace(example, completion=(self._prompts.eos_id,)) for example in group]
        return collate(group, self._prompts).to(self._device)

    def _encode(self, batch: MicroBatch) -> Tensor:
        features = self._log_mel(batch.pcm, batch.windows_per_example)
        audio: Tensor = self._model.model.get_audio_features(features, return_dict=True).pooler_output
        return audio

    def _has_room(self, group: Sequence[Example]) -> bool:
        """Whether a group can enter now; without any others it always can, into a new cache if need be."""
        num_rows, num_positions = self._room_for(group)
        cache = self._cache
        if cache is None or cache.num_rows < num_rows or cache.num_positions < num_positions:
            if self._running:
                return False
            self._make_cache(num_rows, num_positions)
            return True
        windows = sum(example.num_windows for example in (*group, *(row.example for row in self._running)))
        return not self._running or (len(group) <= self._num_free and windows <= self._max_windows)

    @property
    def _num_free(self) -> int:
        """Rows without an utterance."""
        return 0 if self._cache is None else self._cache.num_rows - len(self._running)

    def _room_for(self, group: Sequence[Example]) -> tuple[int, int]:
        """Rows, and positions of each, for examples such as these."""
        most_windows = max(example.num_windows for example in group)
        num_positions = max(len(example.prompt) + self._limit(example) for example in group)
        return max(len(group), rows_for(most_windows, self._max_rows, self._max_windows)), room_for(num_positions)

    def _make_cache(self, num_rows: int, num_positions: int) -> None:
        # The old one is freed first. Recorded steps refer to it.
        self._replays.clear()
        self._cache = None
        config = self._model.config.text_config
        self._cache = RowCache(
            num_rows,
            num_positions,
            num_blocks=config.num_hidden_layers,
            num_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            dtype=self._model.lm_head.weight.dtype,
            device=self._device,
        )
        self._tokens = torch.zeros(num_rows, dtype=torch.int64, device=self._device)
        self._positions = torch.zeros_like(self._tokens)

    def _enter(self, group: Sequence[Example], with_loss: bool) -> Progress:
        """Encode a group, fill its rows, and choose its first tokens."""
        assert self._cache is not None
        first = len(self._running)
        rows = slice(first, first + len(group))
        batch = self._collate(group, with_loss)
        width = batch.input_ids.shape[1]
        ends = [number * width + len(example.prompt) for number, example in enumerate(group)]
        last_places = torch.tensor(ends).to(self._device) - 1
        with without_cudnn():
            cache = self._cache.entering(first)
            hidden = self._model.causal_states(batch.input_ids, self._encode(batch), batch.audio_places, cache)
        states = hidden.flatten(0, 1)
        loss_sum = 0.0
        if with_loss:
            loss_sum = float(self._model.lm_head(states[batch.target_places], batch.target_ids, LOSS_CHUNK_TOKENS))
        self._tokens[rows] = self._model.lm_head(states[last_places]).argmax(-1)
        self._positions[rows] = last_places % width + 1
        self._running += [_Running(example, self._limit(example), len(example.prompt)) for example in group]
        ended = self._take(first, self._tokens[rows].tolist())
        return Progress(ended, loss_sum, batch.num_target_tokens if with_loss else 0)

    def _step(self) -> Progress:
        """Advance every row by a token."""
        num_rows = len(self._running)
        self._forward(num_rows, 1 + max(row.position for row in self._running))
        for row in self._running:
            row.position += 1
        return Progress(self._take(0, self._tokens[:num_rows].tolist()))

    def _forward(self, num_rows: int, num_attended: int) -> None:
        if self._record is None:
            self._advance(num_rows, num_attended)
            return
        assert self._cache is not None
        shape = (
            min(rounded_size(num_rows), self._cache.num_rows),
            min(rounded_size(num_attended), self._cache.num_positions),
        )
        if shape not in self._replays:
            # The first time loads kernels and makes their workspaces, which cannot be recorded.
            self._replays[shape] = None
            self._advance(*shape)
            return
        replay = self._replays[shape] or self._record(partial(self._advance, *shape))
        self._replays[shape] = replay
        replay()

    def _advance(self, num_rows: int, num_attended: int) -> None:
        """One token for each of the first rows, from and to tensors that stay where they are."""
        assert self._cache is not None
        tokens, positions = self._tokens[:num_rows], self._positions[:num_rows]
        with masked_attention(self._model):
            hidden = self._model.next_states(tokens, positions, self._cache, num_attended)
        tokens.copy_(self._model.lm_head(hidden).argmax(-1))
        # Rows without an utterance, which a rounded number includes, stay inside of the cache.
        positions.add_(1).clamp_(max=self._cache.num_positions - 1)

    def _take(self, first: int, tokens: Sequence[int]) -> list[tuple[Example, list[int]]]:
        """Give rows from `first` on their next tokens, and remove those that end."""
        ended = []
        # From behind, so that the last row is never one that ends too.
        for number in reversed(range(first, first + len(tokens))):
            row = self._running[number]
            row.ids.append(tokens[number - first])
            if row.ids[-1] == self._prompts.eos_id or len(row.ids) >= row.limit:
                # A prompt may fill the model's last position.
                ended.append((row.example, row.ids[: row.limit]))
                self._remove(number)
        return ended

    def _remove(self, number: int) -> None:
        """Free a row, and move the last utterance there."""
        assert self._cache is not None
        last = self._running.pop()
        if number == len(self._running):
            return
        self._running[number] = last
        source = len(self._running)
        self._cache.move(source, number, last.position)
        for state in (self._tokens, self._positions):
            state[number] = state[source]

    @property
    def _device(self) -> torch.device:
        return self._log_mel.device


def rows_for(num_windows: int, max_rows: int, max_windows: int) -> int:
    """Rows for utterances of this many windows each."""
    return max(1, min(max_rows, max_windows // num_windows))


def room_for(num_positions: int) -> int:
    """Positions of a row that holds this many."""
    return -(-num_positions // _POSITIONS_MULTIPLE) * _POSITIONS_MULTIPLE


def rounded_size(size: int) -> int:
    """The next power of two, or three halves of one: at most two sizes in an octave, because each is compiled alone."""
    power: int = 1 << (size - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power


def cuda_graphs(device: torch.device) -> Record | None:
    """What records steps as CUDA graphs that share their memory; None where there are none."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    pool = torch.cuda.graph_pool_handle()

    def record(step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, go on using the device.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
        replay: Callable[[], None] = graph.replay
        return replay

    return record

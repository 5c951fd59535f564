"""Continuous batching gives the hypotheses of transformers' `generate`, whatever shares the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.distributed.world import World
from voxtral_dist.evaluation.batch_decoder import BatchDecoder, DecodedExamples, groups_of, load_decoder
from voxtral_dist.evaluation.continuous_decoder import ContinuousDecoder, rounded_size
from voxtral_dist.model.prompts import VoxtralPrompts

NUM_UTTERANCES = 23
CPU = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def examples(fitted_model: Path, heard: Path) -> list[Example]:
    """Prompts of one to three windows: with and without language and context, transcripts and answers."""
    prompts = VoxtralPrompts.from_pretrained(str(fitted_model))
    reader = UtteranceReader(read_index([str(heard)]), prompts, max_target_tokens=None, takes_all=True)
    read = [reader.example(number) for number in range(NUM_UTTERANCES)]
    for number in (2, 9, 16):
        prompt = prompts.transcription(None, read[number].num_windows, "Keywords: bottles, Zug")
        read[number] = replace(read[number], prompt=prompt, is_untagged=True)
        prompt = prompts.instruction("What is said?", read[number + 1].num_windows)
        read[number + 1] = replace(read[number + 1], prompt=prompt, is_transcription=False)
    return read


def decoder_of(model: Path, **settings: Any) -> BatchDecoder:
    prompts = VoxtralPrompts.from_pretrained(str(model))
    return load_decoder(str(model), prompts, EvaluationConfig.model_validate(settings), "float32", CPU)


def generated(model: Path, examples: Sequence[Example], **settings: Any) -> DecodedExamples:
    """What transformers' `generate` gives, for all examples in one batch."""
    decoder = decoder_of(model, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchDecoder, "is_continuous", False)
        return decoder.decode(examples, with_loss=True)


@pytest.mark.parametrize("max_tokens_per_second", [1.0, 12.5])
def test_any_number_of_rows_gives_the_hypotheses_and_the_loss_of_generate(
    fitted_model: Path, examples: list[Example], max_tokens_per_second: float
) -> None:
    expected = generated(fitted_model, examples, max_tokens_per_second=max_tokens_per_second)
    hits = [one.hit_limit for one in expected.hypotheses]
    assert any(hits)
    assert len({one.num_tokens for one in expected.hypotheses}) > 4
    in_groups = [groups_of(examples), [examples[:1], examples[1:3], examples[3:]]]
    one_by_one = [[example] for example in examples]
    for settings, order in (
        ({"batch_size": 1}, [one_by_one]),
        ({"batch_size": 3}, [one_by_one]),
        ({"batch_size": 8, "max_windows": 5}, [one_by_one]),
        # The second time in the cache of the first.
        ({"batch_size": 64}, in_groups),
    ):
        decoder = decoder_of(fitted_model, max_tokens_per_second=max_tokens_per_second, **settings)
        for groups in order:
            parts = list(decoder.stream(groups, with_loss=True))
            pairs = [pair for part in parts for pair in part.pairs]
            assert sorted(id(example) for example, _ in pairs) == sorted(map(id, examples)), "each ends once"
            found = {id(example): hypothesis for example, hypothesis in pairs}
            assert [found[id(example)] for example in examples] == expected.hypotheses, settings
            assert sum(part.loss_sum for part in parts) == pytest.approx(expected.loss_sum, rel=1e-5)
            assert sum(part.num_target_tokens for part in parts) == expected.num_target_tokens
    without_loss = decoder.decode(examples[:4], with_loss=False)
    assert without_loss.hypotheses == expected.hypotheses[:4]
    assert without_loss.num_target_tokens == without_loss.loss_sum == 0


def test_a_prompt_without_room_for_a_token_has_an_empty_hypothesis(fitted_model: Path, examples: list[Example]) -> None:
    decoder = decoder_of(fitted_model)
    expected = decoder.decode(examples[:4], with_loss=False).hypotheses
    continuous = decoder._continuous
    continuous._limit = lambda example: 0 if example is examples[1] else decoder._limit(example)
    found = decoder.decode(examples[:4], with_loss=False).hypotheses
    assert (found[1].text, found[1].num_tokens, found[1].hit_limit) == ("", 0, True)
    assert [found[number] for number in (0, 2, 3)] == [expected[number] for number in (0, 2, 3)]


def watch_steps(decoder: ContinuousDecoder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The numbers of rows and of attended positions of all steps to come."""
    steps: list[tuple[int, int]] = []
    advance = decoder._advance

    def watched(num_rows: int, num_attended: int) -> None:
        steps.append((num_rows, num_attended))
        advance(num_rows, num_attended)

    monkeypatch.setattr(decoder, "_advance", watched)
    return steps


def test_rows_are_refilled_while_others_go_on(
    fitted_model: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of(fitted_model, batch_size=4)
    steps = watch_steps(decoder._continuous, monkeypatch)
    waiting = iter(examples)
    num_left = []

    def one_by_one() -> Any:
        for example in waiting:
            num_left.append(len(steps))
            yield [example]

    parts = list(decoder.stream(one_by_one(), with_loss=False))
    tokens = sum(one.num_tokens + (not one.hit_limit) for part in parts for one in part.hypotheses)
    # The first token of each comes with its prompt.
    assert sum(num_rows for num_rows, _ in steps) == tokens - len(examples)
    until_last_entered = [num_rows for num_rows, _ in steps[: num_left[-1]]]
    assert until_last_entered
    assert set(until_last_entered) == {4}
    batch_by_batch = [
        decoder.decode(examples[first : first + 4], with_loss=False) for first in range(0, NUM_UTTERANCES, 4)
    ]
    longest = [max(one.num_tokens for one in batch.hypotheses) for batch in batch_by_batch]
    assert num_left[-1] < sum(longest[:-1])


def test_long_prompts_get_a_cache_of_their_own_when_the_other_is_empty(
    fitted_model: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of(fitted_model, batch_size=4, max_windows=4)
    by_windows = sorted(examples, key=lambda example: -example.num_windows)
    made = []
    make = decoder._continuous._make_cache

    def watched(num_rows: int, num_positions: int) -> None:
        assert not decoder._continuous._running
        assert num_positions % 64 == 0
        made.append(num_rows)
        make(num_rows, num_positions)

    monkeypatch.setattr(decoder._continuous, "_make_cache", watched)
    parts = list(decoder.stream([[example] for example in by_windows], with_loss=False))
    assert sum(len(part.pairs) for part in parts) == len(examples)
    assert made == [1, 2, 4]
    assert decoder._continuous._cache is not None
    assert decoder._continuous._cache.num_rows == 4


@dataclass
class Recorder(TorchDispatchMode):  # type: ignore[misc]
    """What a CUDA graph does: it repeats operations with the same tensors and numbers, and asks the host nothing."""

    decoder: ContinuousDecoder
    operations: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph cannot read values"
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        state = (self.decoder._tokens, self.decoder._positions)
        before = [one.clone() for one in state]
        with self:
            step()
        # Recording runs nothing on a GPU. What it wrote into the cache is written again.
        for one, value in zip(state, before, strict=True):
            one.copy_(value)
        return self.replay

    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


def test_recorded_steps_give_the_same_hypotheses_in_few_shapes(
    fitted_model: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of(fitted_model, batch_size=6)
    expected = decoder.decode(examples, with_loss=False).hypotheses
    eager = watch_steps(decoder._continuous, monkeypatch)
    decoder.decode(examples, with_loss=False)
    monkeypatch.undo()
    recorded = []

    def record(step: Callable[[], None]) -> Callable[[], None]:
        recorder = Recorder(decoder._continuous)
        recorded.append(recorder)
        return recorder.record(step)

    decoder._continuous._record = record
    assert decoder.decode(examples, with_loss=False).hypotheses == expected
    shapes = decoder._continuous._replays
    assert len(recorded) == sum(replay is not None for replay in shapes.values()) > 1
    assert len(shapes) < len(set(eager)) / 3
    for num_rows, num_attended in shapes:
        assert num_rows in (rounded_size(num_rows), 6)
        assert num_attended in (rounded_size(num_attended), decoder._continuous._cache.num_positions)

"""The sizes of decoded batches that the estimate of memory is made of, and the room of static caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.data.examples.example import Example
from voxtral_dist.distributed.world import World
from voxtral_dist.evaluation.batch_decoder import BatchDecoder, load_decoder
from voxtral_dist.evaluation.building import build_test_sets
from voxtral_dist.evaluation.continuous_decoder import rounded_size
from voxtral_dist.evaluation.decoding_memory import DecodingShape
from voxtral_dist.evaluation.test_set import TestSet
from voxtral_dist.model.prompts import VoxtralPrompts

CPU = torch.device("cpu")


def settings_on(shards: Path, context: object = None, **more: object) -> EvaluationConfig:
    test_sets = {"speech": {"shards": str(shards), "context": context}}
    return EvaluationConfig.model_validate({"test_sets": test_sets, "max_tokens_per_second": 4.0, **more})


def most_positions(test_set: TestSet, decoder: BatchDecoder) -> int:
    """The most positions of a batch, with the prompts and limits that decoding has."""
    batches = [test_set.read(batch) for batch in test_set.batches]
    return max(
        len(examples) * max(len(example.prompt) + decoder._limit(example) for example in examples)
        for examples in batches
    )


def shape_of(examples: Sequence[Example], decoder: BatchDecoder) -> DecodingShape:
    """What is decoded of a batch."""
    return DecodingShape(
        num_examples=len(examples),
        num_windows=sum(example.num_windows for example in examples),
        num_prompt_tokens=max(len(example.prompt) for example in examples),
        num_new_tokens=max(decoder._limit(example) for example in examples),
        num_target_tokens=max(len(example.completion) for example in examples),
    )


@pytest.mark.parametrize("sizes", [None, (0, 40)], ids=["plain", "lists"])
def test_the_estimate_of_positions_holds_those_of_every_batch(
    tiny_model: Path, shard_folder: Path, prompts: VoxtralPrompts, tmp_path: Path, sizes: tuple[int, ...] | None
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("bottles\nGenève\n" + "".join(f"word{number}\n" for number in range(100)), encoding="utf-8")
    context = None if sizes is None else {"words": words, "num_distractors": sizes}
    settings = settings_on(shard_folder, context, batch_size=4)
    decoder = load_decoder(str(tiny_model), prompts, settings, "float32", World(0, 1, 0, CPU))
    for test_set in build_test_sets(settings, prompts, target_text=()):
        needed = most_positions(test_set, decoder)
        estimated = max(
            shape.num_examples * (shape.num_prompt_tokens + shape.num_new_tokens) for shape in test_set.decoding_shapes
        )
        assert needed <= estimated < 2 * needed, test_set.name
        if test_set.num_distractors is None:
            read = dict.fromkeys(shape_of(test_set.read(batch), decoder) for batch in test_set.batches)
            for shape, known in zip(read, test_set.decoding_shapes, strict=True):
                # Prompts are taken to have the longest tag of a language; shards are packed with a larger vocabulary.
                assert shape.num_prompt_tokens <= known.num_prompt_tokens
                assert shape == replace(
                    known, num_prompt_tokens=shape.num_prompt_tokens, num_target_tokens=shape.num_target_tokens
                )


@pytest.mark.parametrize(
    ("num_positions", "length"), [(1, 1), (3, 3), (4, 4), (5, 6), (6, 6), (7, 8), (449, 512), (513, 768), (769, 1024)]
)
def test_lengths_of_static_caches_are_powers_of_two_or_halfway_between(num_positions: int, length: int) -> None:
    assert rounded_size(num_positions) == length


def test_static_caches_have_few_lengths_and_the_same_hypotheses(
    tiny_model: Path, shard_folder: Path, prompts: VoxtralPrompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_on(shard_folder, batch_size=1, num_beams=2)
    (test_set,) = build_test_sets(settings, prompts, target_text=())
    examples = [test_set.read(batch) for batch in reversed(test_set.batches)]
    plain = load_decoder(str(tiny_model), prompts, settings, "float32", World(0, 1, 0, CPU))
    expected = [plain(batch) for batch in examples]
    made: list[int] = []
    initialize = StaticCache.__init__

    def recorded(cache: StaticCache, *arguments: Any, **named: Any) -> None:
        made.append(named["max_cache_len"])
        initialize(cache, *arguments, **named)

    monkeypatch.setattr(StaticCache, "__init__", recorded)
    static = settings.model_copy(update={"static_cache": True})
    decoder = load_decoder(str(tiny_model), prompts, static, "float32", World(0, 1, 0, CPU))
    assert [decoder(batch) for batch in examples] == expected
    needed = [len(example.prompt) + decoder._limit(example) for (example,) in examples]
    assert made == [rounded_size(one) for one in needed]
    # Neither the longest batch so far nor every length of its own.
    assert made[-1] > made[0]
    assert len(set(made)) < len(set(needed))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_penalties_of_a_checkpoint_change_no_hypothesis(
    tiny_model: Path, shard_folder: Path, prompts: VoxtralPrompts, num_beams: int
) -> None:
    settings = settings_on(shard_folder, num_beams=num_beams)
    (test_set,) = build_test_sets(settings, prompts, target_text=())
    examples = test_set.read(test_set.batches[-1])
    decoder = load_decoder(str(tiny_model), prompts, settings, "float32", World(0, 1, 0, CPU))
    expected = decoder(examples)
    decoder._model.generation_config.repetition_penalty = 9.0
    assert decoder(examples) == expected
    assert decoder._model.generation_config.repetition_penalty == 9.0

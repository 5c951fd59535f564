"""Continuous batching by itself: one process decodes utterances of very different lengths in three ways."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.continuous_batching import ContinuousBatchingManager

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.distributed.world import World
from voxtral_dist.evaluation.batch_decoder import BatchDecoder, Hypothesis, groups_of, load_decoder
from voxtral_dist.model.prompts import VoxtralPrompts

BATCH_SIZE = 8
MAX_TOKENS_PER_SECOND = 6.0
Decode = Callable[[BatchDecoder, Sequence[Sequence[Example]]], list[Hypothesis]]


class _ByGenerate(BatchDecoder):
    is_continuous = False  # type: ignore[assignment]


def one_process(model: str, shards: str, num_utterances: int, num_rounds: int) -> dict[str, Any]:
    """Measure all ways in turns, in core seconds.

    Raises:
        RuntimeError: hypotheses differ.
    """
    torch.set_num_threads(1)
    prompts = VoxtralPrompts.from_pretrained(model)
    settings = EvaluationConfig(batch_size=BATCH_SIZE, max_tokens_per_second=MAX_TOKENS_PER_SECOND)
    decoder = load_decoder(model, prompts, settings, "float32", World(0, 1, 0, torch.device("cpu")))
    with torch.no_grad():
        # No hypothesis ends before its limit.
        decoder._model.lm_head.weight[prompts.eos_id] = 0.0
    reader = UtteranceReader(read_index([shards]), prompts, max_target_tokens=None, takes_all=True)
    examples = [reader.example(number) for number in range(num_utterances)]
    batches = [examples[first : first + BATCH_SIZE] for first in range(0, num_utterances, BATCH_SIZE)]
    passes = _count_steps(decoder)
    ways: dict[str, Decode] = {"continuous": _continuously, "batch by batch": _by_batches, "generate": _by_generate}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[Hypothesis]] = {}
    num_steps = {}
    for _ in range(num_rounds):
        for name, decode in ways.items():
            passes.clear()
            started = time.process_time()
            found[name] = decode(decoder, batches)
            seconds[name].append(time.process_time() - started)
            num_steps[name] = len(passes)
    # The first tokens come with the prompts.
    num_steps["generate"] = sum(max(decoder._limit(one) for one in batch) - 1 for batch in batches)
    different = [name for name in ways if found[name] != found["continuous"]]
    if different:
        raise RuntimeError(f"{different} give other hypotheses than continuous batching.")
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "continuous_ratio": medians["batch by batch"] / medians["continuous"],
        "generate_ratio": medians["generate"] / medians["continuous"],
        "steps_ratio": num_steps["batch by batch"] / num_steps["continuous"],
        "steps": num_steps,
        "core_seconds_of_one_process": seconds,
        "tokens_of_hypotheses": [min(_lengths(found)), statistics.mean(_lengths(found)), max(_lengths(found))],
        "requests_of_transformers_continuous_batching": list(
            inspect.signature(ContinuousBatchingManager.add_request).parameters
        ),
    }


def _count_steps(decoder: BatchDecoder) -> list[int]:
    """The number of rows of each step of continuous batching from now on."""
    steps: list[int] = []
    continuous = decoder._continuous
    advance = continuous._advance

    def counted(num_rows: int, num_attended: int) -> None:
        steps.append(num_rows)
        advance(num_rows, num_attended)

    continuous._advance = counted  # type: ignore[method-assign]
    return steps


def _lengths(found: dict[str, list[Hypothesis]]) -> list[int]:
    return [one.num_tokens for one in found["continuous"]]


def _continuously(decoder: BatchDecoder, batches: Sequence[Sequence[Example]]) -> list[Hypothesis]:
    groups = [group for batch in batches for group in groups_of(batch)]
    pairs = [pair for part in decoder.stream(groups, with_loss=False) for pair in part.pairs]
    hypotheses = {example.utterance_id: hypothesis for example, hypothesis in pairs}
    return [hypotheses[number] for number in sorted(hypotheses)]


def _by_batches(decoder: BatchDecoder, batches: Sequence[Sequence[Example]]) -> list[Hypothesis]:
    return [one for batch in batches for one in decoder.decode(batch, with_loss=False).hypotheses]


def _by_generate(decoder: BatchDecoder, batches: Sequence[Sequence[Example]]) -> list[Hypothesis]:
    decoder.__class__ = _ByGenerate
    try:
        return _by_batches(decoder, batches)
    finally:
        decoder.__class__ = BatchDecoder

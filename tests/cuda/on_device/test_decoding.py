"""Decoding on the device: the transcripts of the CPU, and no more waits for each token than are listed here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.distributed.world import World
from voxtral_dist.evaluation.batch_decoder import DecodedExamples, load_decoder
from voxtral_dist.model.prompts import VoxtralPrompts

from fake_cuda import CUDA, fake_cuda, log
from workloads.fitted import fit

NUM_UTTERANCES = 4

# Waits for each token by place, and the reason for which they stay. Greedy decoding waits for 3 ms of work, and replays
# a graph for the next token; a beam search prepares about 25 ms for it.
WAITS_OF_A_TOKEN = {
    "evaluation.continuous_decoder.ContinuousDecoder._step: reads values": "the tokens, because some may end",
    "evaluation.batch_decoder.BatchDecoder._generate: reads a value": "transformers: whether any hypothesis goes on",
    "model.voxtral.TrainedVoxtral.forward: reads a value": "transformers: whether any prompt is padded, for the mask",
}
# What else a batch waits for, whatever its number of tokens: copies of its inputs, the search's settings, its results.
MOST_WAITS_OF_A_BATCH = 45


@pytest.fixture(scope="module")
def fitted_model(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows some utterances by heart, so that transcripts end at different lengths."""
    folder = tmp_path_factory.mktemp("models") / "fitted"
    fit(tiny_model, shard_folder, folder, num_utterances=NUM_UTTERANCES, batch_size=NUM_UTTERANCES, num_steps=20)
    return folder


@pytest.fixture(scope="module")
def examples(fitted_model: Path, shard_folder: Path) -> list[Example]:
    prompts = VoxtralPrompts.from_pretrained(str(fitted_model))
    reader = UtteranceReader(read_index([str(shard_folder)]), prompts, max_target_tokens=None, takes_all=True)
    return [reader.example(number) for number in range(NUM_UTTERANCES)]


@dataclass(frozen=True)
class Decoding:
    """A decoded batch, the steps of its search, and the waits of all of it."""

    batch: DecodedExamples
    num_steps: int
    waits: Counter[str]


def decode(
    model: Path, examples: list[Example], device: torch.device, precision: str, settings: Mapping[str, Any]
) -> Decoding:
    prompts = VoxtralPrompts.from_pretrained(str(model))
    config = EvaluationConfig.model_validate(settings)
    decoder = load_decoder(str(model), prompts, config, precision, World(0, 1, 0, device))
    log.take()
    batch = decoder.decode(examples, with_loss=True)
    # `</s>` is no token of a hypothesis.
    return Decoding(batch, max(one.num_tokens + 1 for one in batch.hypotheses), log.take().waits)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 3, "static_cache": True}], ids=["greedy", "beams", "static"]
)
def test_transcripts_are_those_of_the_cpu_and_few_waits_recur(
    fitted_model: Path, examples: list[Example], precision: str, settings: dict[str, Any]
) -> None:
    expected = decode(fitted_model, examples, torch.device("cpu"), precision, settings).batch
    assert len({one.num_tokens for one in expected.hypotheses}) > 2
    with fake_cuda():
        decoding = decode(fitted_model, examples, CUDA, precision, settings)
    assert decoding.batch.hypotheses == expected.hypotheses
    assert decoding.batch.loss_sum == pytest.approx(expected.loss_sum, rel=2e-5 if precision == "float32" else 2e-2)
    recurring = {place for place, count in decoding.waits.items() if count >= decoding.num_steps}
    assert recurring <= WAITS_OF_A_TOKEN.keys()
    assert decoding.waits.total() <= len(WAITS_OF_A_TOKEN) * decoding.num_steps + MOST_WAITS_OF_A_BATCH

"""Hypotheses and word error rate of a test set do not depend on the number of ranks and the batch size."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.data.examples.example import Example
from voxtral_dist.distributed.world import World, alone
from voxtral_dist.errors import ReadError, UserError
from voxtral_dist.evaluate import EvaluationOptions, evaluate
from voxtral_dist.evaluation.batch_decoder import DecodedExamples
from voxtral_dist.evaluation.decoding import Decoded, EvaluationStoppedError, decode_batches
from voxtral_dist.evaluation.evaluating import measured_over_ranks
from voxtral_dist.scoring.results import TestSetResult

from corpora import pack_manifest, write_speech_manifest
from ranks import run_ranks

NUM_UTTERANCES = 31
Rows = list[dict[str, object]]


def evaluate_on(world: World, model: str, shards: Path, batch_size: int, out_dir: Path) -> TestSetResult:
    settings = EvaluationConfig(batch_size=batch_size, max_tokens_per_second=2.0)
    options = EvaluationOptions(settings)
    return dict(evaluate(model, [str(shards)], options, "float32", out_dir, world))[shards.name]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "thirty-one"
    speech = tmp_path_factory.mktemp("speech")
    pack_manifest(write_speech_manifest(speech, NUM_UTTERANCES, max_seconds=2.8), folder, 10**6, skip_bad=False)
    return folder


def results(folder: Path) -> tuple[Rows, dict[str, object]]:
    rows = [json.loads(line) for line in (folder / "thirty-one.jsonl").read_text().splitlines()]
    score = json.loads((folder / "thirty-one.json").read_text())
    # Wall time differs between runs.
    assert score.pop("rtfx") == pytest.approx(score["audio_seconds"] / score.pop("decode_seconds"))
    # Losses are summed in another order.
    return rows, score | {name: pytest.approx(score[name], rel=1e-5) for name in ("loss", "perplexity")}


def test_ranks_and_batch_sizes_do_not_change_the_word_error_rate(
    tiny_model: Path, shards: Path, tmp_path: Path
) -> None:
    found = []
    for world_size, batch_size in [(1, 8), (1, 1), (2, 3), (3, 8)]:
        out_dir = tmp_path / f"{world_size}-{batch_size}"
        scores = run_ranks(world_size, evaluate_on, str(tiny_model), shards, batch_size, out_dir)
        assert all(score == scores[0] for score in scores), "every rank has the score"
        found.append(results(out_dir))
    rows, score = found[0]
    assert [row["utterance_id"] for row in rows] == list(range(NUM_UTTERANCES))
    assert score["num_utterances"] == NUM_UTTERANCES
    assert len({row["hypothesis"] for row in rows}) > 1, "hypotheses must differ for this to mean anything"
    assert all(other == found[0] for other in found[1:])


def loss_over_ranks(world: World, ranks: list[list[float]]) -> float | None:
    decoded = Decoded(pairs=[], losses=ranks[world.rank], num_target_tokens=1, seconds=0.0)
    return measured_over_ranks(decoded, world).loss


def test_the_loss_does_not_depend_on_which_rank_decodes_what() -> None:
    # Added one by one, the small ones would be lost, or not.
    large, small = 2.0**53, 1.0
    for ranks in ([[large, small], [small]], [[small, small], [large]]):
        assert run_ranks(2, loss_over_ranks, ranks)[0] == (large + 2.0) / 2


class Instant:
    """A stand-in for `BatchDecoder` that takes no time."""

    in_lockstep = False
    is_continuous = False

    def decode(self, examples: list[Example], *, with_loss: bool) -> DecodedExamples:
        return DecodedExamples([])


def seconds_after_loading(world: World, late: float) -> float:
    time.sleep(late * world.rank)
    return decode_batches("speech", [(0,), (1,)], lambda _: [], Instant(), False, world).seconds  # type: ignore[arg-type]


def test_the_time_of_decoding_begins_when_all_ranks_are_ready() -> None:
    assert max(run_ranks(2, seconds_after_loading, 4.0)) < 2.0


class Counting(Instant):
    """The same, which counts its batches; `in_lockstep` or not."""

    def __init__(self, in_lockstep: bool) -> None:
        self.in_lockstep = in_lockstep
        self.num_batches = 0
        self.silence = None

    def decode(self, examples: list[Example], *, with_loss: bool, most_windows: int | None = None) -> DecodedExamples:
        self.num_batches += 1
        time.sleep(0.02)
        return DecodedExamples([])


def stopped_on_rank_1(world: World, in_lockstep: bool) -> tuple[int, bool]:
    """Batches of this rank before all stop because rank 1 is asked to at its third one, and whether they stopped."""
    decoder = Counting(in_lockstep)
    batches = [(number,) for number in range(1000)]
    try:
        decode_batches(
            "speech",
            batches,
            lambda _: [],
            decoder,  # type: ignore[arg-type]
            False,
            world,
            lambda: world.rank == 1 and decoder.num_batches == 2,
        )
    except EvaluationStoppedError:
        return decoder.num_batches, True
    return decoder.num_batches, False


@pytest.mark.parametrize("in_lockstep", [False, True])
def test_all_ranks_stop_an_evaluation_before_the_next_batch(in_lockstep: bool) -> None:
    first, second = run_ranks(2, stopped_on_rank_1, in_lockstep)
    assert second == (2, True)
    assert first[1]
    assert first[0] == 2 if in_lockstep else first[0] < 500


def refusal_of_rank_1(world: World, in_lockstep: bool) -> tuple[str, int, str]:
    """What this rank raises because the storage fails at rank 1's third batch."""
    decoder = Counting(in_lockstep)

    def read(_: tuple[int, ...]) -> list[Example]:
        if world.rank == 1 and decoder.num_batches == 2:
            raise ReadError("x.tar cannot be read: no answer within 30 s (6 attempts).")
        return []

    batches = [(number,) for number in range(1000)]
    with pytest.raises(UserError) as raised:
        decode_batches("speech", batches, read, decoder, False, world)  # type: ignore[arg-type]
    return type(raised.value).__name__, raised.value.exit_code, str(raised.value)


@pytest.mark.parametrize("in_lockstep", [False, True])
def test_a_storage_that_fails_ends_an_evaluation_on_all_ranks_and_is_no_unusable_utterance(in_lockstep: bool) -> None:
    first, second = run_ranks(2, refusal_of_rank_1, in_lockstep)
    assert first == second
    sentence = "The evaluation of `speech` ended on rank 1: x.tar cannot be read: no answer within 30 s (6 attempts)."
    assert first == ("ReadError", 74, sentence)


def test_an_error_that_ranks_in_lockstep_cannot_learn_of_is_raised_where_it_comes() -> None:
    def fail_later(num_before: int) -> None:
        if num_before == 2:
            raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        decode_batches(
            "speech",
            [(0,), (1,), (2,)],
            lambda _: [],
            Counting(in_lockstep=True),  # type: ignore[arg-type]
            False,
            alone("cpu"),
            on_progress=fail_later,
        )

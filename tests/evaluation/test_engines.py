"""Hypotheses are the same under every engine, with weights gathered or in lockstep, on any number of ranks."""

from __future__ import annotations

import gc
import json
import shutil
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from voxtral_dist.config import EvaluationConfig, RunConfig
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.plain_copy import plain_copy
from voxtral_dist.errors import SharedError, UserError
from voxtral_dist.evaluate import EvaluationOptions, evaluate
from voxtral_dist.evaluation.batch_decoder import BatchDecoder
from voxtral_dist.evaluation.building import build_test_sets, refuse_different_test_sets
from voxtral_dist.evaluation.decoding_weights import decoding_weights
from voxtral_dist.evaluation.evaluating import evaluate_test_set
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.weights import load_for_inference
from voxtral_dist.scoring.normalizer import normalizer

from ranks import run_ranks
from runs import run_config

NUM_UTTERANCES = 23
SET = "heard"
CPU = torch.device("cpu")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """Settings of an evaluation, and whether they make ranks decode in lockstep."""

    engine: dict[str, Any]
    settings: dict[str, Any]
    in_lockstep: bool = False

    @property
    def name(self) -> str:
        return " ".join(str(part) for part in (*self.engine.values(), *self.settings.values()))


FSDP2: dict[str, Any] = {"engine": {"fsdp2": {}}}
KEPT: dict[str, Any] = {"engine": {"fsdp2": {"reshard_after_forward": False}}}
CASES = [
    Case({"stage": 0}, {"batch_size": 8}),
    Case({"stage": 1}, {"batch_size": 3}),
    Case({"stage": 2}, {"batch_size": 8, "max_windows": 5}),
    Case({"stage": 2}, {"batch_size": 8, "static_cache": True, "num_beams": 3}),
    Case({"stage": 3}, {"batch_size": 8}),
    Case({"stage": 3}, {"batch_size": 3, "weights": "sharded"}, in_lockstep=True),
    Case({"stage": 3}, {"batch_size": 3, "weights": "sharded", "num_beams": 3}, in_lockstep=True),
    Case({"stage": 3}, {"batch_size": 8, "weights": "gathered", "num_beams": 3}),
    # Fewer batches than ranks, so that a rank has none.
    Case({"stage": 3}, {"batch_size": 8, "weights": "sharded", "max_utterances": 5}, in_lockstep=True),
    Case({"stage": 3}, {"batch_size": 8, "max_utterances": 5}),
    Case(FSDP2, {"batch_size": 3}),
    Case(FSDP2, {"batch_size": 8, "weights": "sharded"}, in_lockstep=True),
    Case(KEPT, {"batch_size": 3, "weights": "sharded", "num_beams": 3}, in_lockstep=True),
]


def rows_of(folder: Path) -> Rows:
    return [json.loads(line) for line in (folder / f"{SET}.jsonl").read_text(encoding="utf-8").splitlines()]


def decode_all(world: World, cases: list[tuple[Case, RunConfig]]) -> list[bool]:
    """Whether ranks decoded in lockstep in each case. Neighbouring cases with equal engines share one."""
    from voxtral_dist.engine.build import build_engine

    found: list[bool] = []
    engine, built_for = None, None
    for case, config in cases:
        if engine is None or case.engine != built_for:
            engine = None
            gc.collect()
            log_mel = LogMel.from_pretrained(config.model.path, world.device)
            engine, built_for = build_engine(config, log_mel, world), case.engine
        prompts = VoxtralPrompts.from_pretrained(config.model.path)
        settings = config.evaluation
        with decoding_weights(engine, settings, 0, world) as (model, in_lockstep, _):
            # Stage 3 replaces it for the whole process, other engines that follow in this test included.
            is_torchs = torch.nn.functional.linear is torch._C._nn.linear
            assert is_torchs or "stage" not in case.engine, "not that of DeepSpeed's stage 3"
            decoder = BatchDecoder(model, prompts, log_mel, settings, in_lockstep)
            for test_set in build_test_sets(settings, prompts, target_text=()):
                evaluate_test_set(test_set, decoder, settings, normalizer("basic"), config.run_dir, world)
        found.append(in_lockstep)
    return found


def config_of(case: Case, number: int, model: Path, heard: Path, folder: Path) -> RunConfig:
    settings = dict(case.settings)
    test_set = {"shards": str(heard), "max_utterances": settings.pop("max_utterances", None)}
    sections = {"evaluation": {"test_sets": {SET: test_set}, **settings}, **case.engine}
    return run_config(folder / f"{number}", model, heard, num_steps=3, **sections)


@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_every_engine_gives_the_hypotheses_of_one_plain_process(
    fitted_model: Path, heard: Path, tmp_path: Path, world_size: int
) -> None:
    expected = {}
    for num_beams in (1, 3):
        options = EvaluationOptions(EvaluationConfig(batch_size=1, num_beams=num_beams))
        out_dir = tmp_path / f"plain-{num_beams}"
        dict(evaluate(str(fitted_model), [str(heard)], options, "float32", out_dir, World(0, 1, 0, CPU)))
        expected[num_beams] = rows_of(out_dir)
    cases = [(case, config_of(case, number, fitted_model, heard, tmp_path)) for number, case in enumerate(CASES)]
    for in_lockstep in run_ranks(world_size, decode_all, cases):
        assert in_lockstep == [case.in_lockstep for case in CASES]
    for case, config in cases:
        rows = rows_of(config.run_dir)
        assert len(rows) == case.settings.get("max_utterances", NUM_UTTERANCES), case.name
        assert rows == expected[case.settings.get("num_beams", 1)][: len(rows)], case.name


def test_hypotheses_end_by_themselves_at_different_lengths(fitted_model: Path, heard: Path, tmp_path: Path) -> None:
    dict(evaluate(str(fitted_model), [str(heard)], EvaluationOptions(), "float32", tmp_path, World(0, 1, 0, CPU)))
    ended = [row["hypothesis"] for row in rows_of(tmp_path) if not row["hit_limit"]]
    assert len(ended) > NUM_UTTERANCES / 2
    assert len({len(hypothesis) for hypothesis in ended}) > 5


def error_and_seconds(world: World, config: RunConfig, fails: bool = False) -> tuple[str, int, float]:
    """How the evaluation ended on this rank, and after how long; with `fails`, rank 1 cannot decode a second batch."""
    from voxtral_dist.engine.build import build_engine

    prompts = VoxtralPrompts.from_pretrained(config.model.path)
    log_mel = LogMel.from_pretrained(config.model.path, world.device)
    engine = build_engine(config, log_mel, world)
    test_sets = build_test_sets(config.evaluation, prompts, target_text=())
    started = time.monotonic()
    with decoding_weights(engine, config.evaluation, 0, world) as (model, in_lockstep, _):
        decoder = BatchDecoder(model, prompts, log_mel, config.evaluation, in_lockstep)
        if world.rank == 1 and fails:
            owner, name = (decoder._continuous, "_enter") if decoder.is_continuous else (decoder, "_generate")
            setattr(owner, name, fails_at_the_second_batch(getattr(owner, name)))
        try:
            evaluate_test_set(test_sets[0], decoder, config.evaluation, normalizer("none"), config.run_dir, world)
        except SharedError as error:
            return str(error), error.exit_code, time.monotonic() - started
    raise AssertionError("the evaluation ended as if nothing had happened")


def fails_at_the_second_batch(generate: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter([generate])

    def failing(*arguments: Any) -> Any:
        call = next(calls, None)
        if call is None:
            raise MemoryError("no room for another batch")
        return call(*arguments)

    return failing


@pytest.mark.parametrize("weights", ["gathered", "sharded"])
def test_an_unusable_utterance_ends_all_ranks_with_its_name(
    fitted_model: Path, heard: Path, tmp_path: Path, weights: str
) -> None:
    damaged = tmp_path / SET
    shutil.copytree(heard, damaged)
    index = read_index([str(damaged)])
    span = index.span(7)
    tar = bytearray(Path(span.location).read_bytes())
    tar[span.offset + 512 : span.offset + span.num_bytes] = b"x" * (span.num_bytes - 512)
    Path(span.location).write_bytes(tar)
    case = Case({"stage": 3}, {"batch_size": 2, "weights": weights})
    results = run_ranks(2, error_and_seconds, config_of(case, 0, fitted_model, damaged, tmp_path))
    assert results[0][0] == results[1][0], "every rank knows the reason"
    for sentence, exit_code, seconds in results:
        assert "The evaluation of `heard` ended on rank" in sentence
        assert "unusable utterance" in sentence
        assert exit_code == 3
        assert seconds < 60
    assert not (tmp_path / "0" / f"{SET}.json").exists()


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_rank_that_cannot_decode_ends_all_others(
    fitted_model: Path, heard: Path, tmp_path: Path, num_beams: int
) -> None:
    case = Case(FSDP2, {"batch_size": 2, "weights": "gathered", "num_beams": num_beams})
    config = config_of(case, 0, fitted_model, heard, tmp_path)
    for sentence, _, seconds in run_ranks(2, error_and_seconds, config, True):
        assert "ended on rank 1: MemoryError: no room for another batch" in sentence
        assert seconds < 60


def how_it_ends(world: World, config: RunConfig) -> tuple[str, str]:
    try:
        error_and_seconds(world, config, fails=True)
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError("the evaluation ended as if nothing had happened")


def test_a_rank_that_cannot_decode_in_lockstep_ends_alone_with_its_reason(
    fitted_model: Path, heard: Path, tmp_path: Path
) -> None:
    case = Case(FSDP2, {"batch_size": 2, "weights": "sharded", "num_beams": 2})
    # The other rank waits for weights, until it is ended or loses the connection.
    other, mine = run_ranks(2, how_it_ends, config_of(case, 0, fitted_model, heard, tmp_path))
    assert mine == (
        "_OthersWaitError",
        "The evaluation of `heard` ended on rank 1: MemoryError: no room for another batch",
    )
    assert other[0] != "SharedError"


def test_a_gathered_copy_leaves_nothing_behind(fitted_model: Path, heard: Path, tmp_path: Path) -> None:
    config = config_of(Case(FSDP2, {}), 0, fitted_model, heard, tmp_path)
    model = load_for_inference(str(fitted_model), CPU, "float32")
    with plain_copy(config.model, config.trainable, model.named_parameters(), model.named_buffers()) as copy:
        held = weakref.ref(copy.model.audio_tower.conv1.weight)
        assert held() is not None
    # This test and the wrapped methods of the copy still hold it.
    assert held() is None
    assert all(weight.is_meta for weight in copy.parameters())
    assert not any(weight.is_meta for weight in model.parameters())


def refuse_what_differs(world: World) -> str:
    seen = [SimpleNamespace(name="same", fingerprint="a"), SimpleNamespace(name="dev", fingerprint=str(world.rank))]
    try:
        refuse_different_test_sets(seen, world)
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_see_other_test_sets_are_refused() -> None:
    sentences = run_ranks(2, refuse_what_differs)
    assert sentences[0] == sentences[1]
    message = "`evaluation.test_sets.dev`: rank 1 sees other shards, another index or other words than rank 0"
    assert message in sentences[0]
    assert run_ranks(1, refuse_what_differs) == [""]

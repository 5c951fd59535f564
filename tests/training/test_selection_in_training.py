"""A real run with scripted WER: it ends early, and exports its best checkpoint."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from voxtral_dist.checkpoints.loading import load_checkpoint
from voxtral_dist.config import RunConfig, SelectionConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.model.weights import load_for_inference
from voxtral_dist.scoring.word_errors import ErrorCounts
from voxtral_dist.train import EXIT_STOPPED
from voxtral_dist.training.metrics_file import read_metrics

from ranks import run_ranks
from runs import run_config

# By step: the best is the second, and two evaluations after it are no better.
SCRIPTED_WER = [0.9, 0.5, 0.3, 0.4, 0.35, 0.1, 0.1]
CPU = torch.device("cpu")


def train_with_scripted_wer(world: World, config: RunConfig) -> int:
    from voxtral_dist.train import train
    from voxtral_dist.training import evaluator

    evaluator.evaluate_test_set = scripted(evaluator.evaluate_test_set)
    return train(config, world)


def scripted(evaluate_test_set: Callable[..., Any]) -> Callable[..., Any]:
    def evaluate(test_set: Any, *arguments: Any) -> Any:
        result, out_dir = evaluate_test_set(test_set, *arguments), arguments[3]
        errors = round(100 * SCRIPTED_WER[int(out_dir.name.split("-")[1])])
        words = ErrorCounts(substitutions=errors, reference_length=100)
        return replace(result, normalized=replace(result.normalized, words=words))

    return evaluate


def evaluation_on(shard_folder: Path, **more: Any) -> dict[str, Any]:
    dev = {"shards": str(shard_folder), "max_utterances": 3}
    return {"test_sets": {"dev": dev}, "max_tokens_per_second": 1.0, **more}


def scripted_run(tmp_path: Path, model: Path, shards: Path, num_steps: int, **sections: Any) -> RunConfig:
    evaluation = evaluation_on(shards, **sections.pop("evaluation", {}))
    return run_config(
        tmp_path / "run",
        model,
        shards,
        num_steps=num_steps,
        evaluation=evaluation,
        metrics={"tensorboard": False},
        **({"stage": 2} | sections),
    )


AVERAGED = {"learning_rate": 2e-3, "warmup_steps": 2, "ema_decay": 0.5}


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param({"stage": 2, "optimizer": AVERAGED}, id="zero2 with averages"),
        pytest.param({"engine": {"fsdp2": {}}}, id="fsdp2", marks=pytest.mark.slow),
    ],
)
def test_the_best_checkpoint_is_kept_and_exported(
    tiny_model: Path, shard_folder: Path, tmp_path: Path, engine: dict[str, Any]
) -> None:
    config = scripted_run(
        tmp_path,
        tiny_model,
        shard_folder,
        num_steps=6,
        checkpoint={"every_steps": 100, "keep": 1},
        evaluation={"every_steps": 1, "selection": {"test_set": "dev", "patience": 2}},
        **engine,
    )
    # The second time nothing is left to do, and the same comes out.
    for _ in range(2):
        assert run_ranks(2, train_with_scripted_wer, config) == [0, 0]
        rows = read_metrics(config.run_dir / "metrics.jsonl")
        assert max(row["step"] for row in rows if row["kind"] == "train") == 4
        assert sorted(path.name for path in (config.run_dir / "checkpoints").iterdir()) == [
            "step-0000002",
            "step-0000004",
        ]
        best = json.loads((config.run_dir / "best.json").read_text())
        assert best == {"step": 2, "wer": 0.3, "checkpoint": "checkpoints/step-0000002"}
        summary = json.loads((config.run_dir / "summary.json").read_text())
        assert (summary["num_steps"], summary["exported_step"], summary["best_wer"]) == (4, 2, 0.3)
        assert summary["wer_after"] == 0.3, "of what is exported"
        at_best = load_checkpoint(str(config.run_dir / best["checkpoint"]), CPU, "auto").state_dict()
        exported = load_for_inference(str(config.run_dir / "export"), CPU, "auto").state_dict()
        assert exported.keys() == at_best.keys()
        assert all(torch.equal(exported[name], weight) for name, weight in at_best.items())
        of_step = load_checkpoint(str(config.run_dir / best["checkpoint"]), CPU, "auto", ema=False).state_dict()
        is_averaged = not all(torch.equal(of_step[name], weight) for name, weight in at_best.items())
        assert is_averaged == ("optimizer" in engine)
        begun_with = load_file(tiny_model / "model.safetensors")
        assert not torch.equal(begun_with["audio_tower.conv1.weight"], at_best["model.audio_tower.conv1.weight"])


def test_a_best_checkpoint_that_is_gone_is_none(tiny_model: Path, shard_folder: Path, tmp_path: Path) -> None:
    config = scripted_run(
        tmp_path,
        tiny_model,
        shard_folder,
        num_steps=3,
        checkpoint={"every_steps": 1, "keep": 1},
        evaluation={"every_steps": 1},
    )
    assert run_ranks(1, train_with_scripted_wer, config) == [0]
    # Selection is configured afterwards, when the best checkpoints by WER are already removed.
    evaluation = config.evaluation.model_copy(update={"selection": SelectionConfig(test_set="dev")})
    selecting = config.model_copy(update={"evaluation": evaluation, "num_steps": 4})
    assert run_ranks(1, train_with_scripted_wer, selecting) == [0]
    assert json.loads((config.run_dir / "best.json").read_text())["step"] == 4
    # And no longer configured: the file would name a removed checkpoint.
    longer = config.model_copy(update={"num_steps": 5})
    assert run_ranks(1, train_with_scripted_wer, longer) == [0]
    assert not (config.run_dir / "best.json").exists()


def test_what_an_attempt_without_a_checkpoint_measured_does_not_count(
    tiny_model: Path, shard_folder: Path, tmp_path: Path
) -> None:
    config = scripted_run(tmp_path, tiny_model, shard_folder, num_steps=3)
    config.run_dir.mkdir()
    # As an attempt with another model leaves it, that was killed before its first checkpoint.
    row = {"kind": "evaluation", "step": 0, "name": "dev", "wer": 3.0, "cer": 3.0}
    (config.run_dir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert run_ranks(1, train_with_scripted_wer, config) == [0]
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    assert [(row["step"], row["wer"]) for row in rows if row["kind"] == "evaluation"] == [(0, 0.9), (3, 0.4)]


def train_and_stop_in_an_evaluation(world: World, config: RunConfig) -> int:
    from voxtral_dist.train import train
    from voxtral_dist.training import evaluator

    original = evaluator.evaluate_test_set

    def evaluate(test_set: Any, *arguments: Any) -> Any:
        if arguments[3].name == "step-0000002" and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(test_set, *arguments)

    evaluator.evaluate_test_set = evaluate
    return train(config, world)


def test_a_run_that_is_asked_to_stop_while_it_evaluates_stops_at_that_step(
    tiny_model: Path, shard_folder: Path, tmp_path: Path
) -> None:
    config = scripted_run(
        tmp_path,
        tiny_model,
        shard_folder,
        num_steps=4,
        checkpoint={"every_steps": 100},
        evaluation={"every_steps": 2},
    )
    assert run_ranks(2, train_and_stop_in_an_evaluation, config) == [EXIT_STOPPED, EXIT_STOPPED]
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    assert max(row["step"] for row in rows if row["kind"] == "train") == 2
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [0], "the rest is not decoded"
    # It resumes with the evaluation that is owed.
    assert run_ranks(2, train_with_scripted_wer, config) == [0, 0]
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [0, 2, 4]

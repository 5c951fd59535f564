"""One rank of this project's evaluation on the shards of a request, under the engine that it names.

    torchrun benchmarks/rivals/voxtral_dist_evaluation.py REQUEST

It is what `voxtral_dist.train` does when an evaluation is due, from gathering the weights to written results.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.collectives import wait_for_all
from voxtral_dist.distributed.world import World, joined_world
from voxtral_dist.engine.build import build_engine
from voxtral_dist.evaluation.batch_decoder import BatchDecoder
from voxtral_dist.evaluation.building import build_test_sets
from voxtral_dist.evaluation.decoding_weights import decoding_weights
from voxtral_dist.evaluation.evaluating import evaluate_test_set
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.scoring.normalizer import normalizer

from rivals.training_runs import TrainingRun
from rivals.voxtral_dist_training import run_config
from workloads.answers import answering_failures, write_answer

TEST_SET = "test"


def main() -> None:
    """Evaluate, and write the answer."""
    run = TrainingRun.read(Path(sys.argv[1]))
    answer = run.answer_path(int(os.environ.get("RANK", "0")))
    with answering_failures(answer), joined_world() as world:
        write_answer(answer, _evaluate(run, world))


def _evaluate(run: TrainingRun, world: World) -> dict[str, Any]:
    config = _config(run)
    settings = config.evaluation
    prompts = VoxtralPrompts.from_pretrained(run.model)
    log_mel = LogMel.from_pretrained(run.model, world.device)
    engine = build_engine(config, log_mel, world)
    (test_set,) = build_test_sets(settings, prompts, target_text=())
    wait_for_all(world)
    started, cores_started = time.perf_counter(), time.process_time()
    with decoding_weights(engine, settings, 0, world) as (model, in_lockstep, why):
        decoder = BatchDecoder(model, prompts, log_mel, settings, in_lockstep)
        evaluate_test_set(test_set, decoder, settings, normalizer("none"), run.folder / "results", world)
    answer: dict[str, Any] = {
        "seconds": time.perf_counter() - started,
        "core_seconds": time.process_time() - cores_started,
        "weights": why,
    }
    if world.is_first:
        lines = (run.folder / "results" / f"{TEST_SET}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        answer["hypotheses"] = [row["hypothesis"] for row in rows]
        answer["hit_limit"] = [row["hit_limit"] for row in rows]
    return answer


def _config(run: TrainingRun) -> RunConfig:
    tree = run_config(run).model_dump()
    tree["evaluation"] |= {
        "test_sets": {TEST_SET: {"shards": run.shards}},
        "batch_size": run.batch_size,
        "weights": run.weights_in_evaluations,
        "max_tokens_per_second": run.max_tokens_per_second,
        # The rival measures none.
        "measures_loss": False,
    }
    return RunConfig.model_validate(tree)


if __name__ == "__main__":
    main()

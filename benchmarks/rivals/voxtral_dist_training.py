"""One rank of this project's training on the shards of a request.

    torchrun benchmarks/rivals/voxtral_dist_training.py REQUEST

It is the loop of `voxtral_dist.train`: the same loader, engine and update, without checkpoints and evaluations.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from voxtral_dist.config import RunConfig
from voxtral_dist.data.loader import StepBatches, TrainLoader, build_train_loader
from voxtral_dist.distributed.world import World, joined_world
from voxtral_dist.engine.build import build_engine
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.train import build_train_step

from rivals.training_runs import TrainingRun
from workloads.answers import answering_failures, write_answer
from workloads.kernels import costliest_kernels
from workloads.peak_memory import status_bytes
from workloads.step_meter import StepMeter
from workloads.step_parts import StepParts


def main() -> None:
    """Train, and write the answer."""
    run = TrainingRun.read(Path(sys.argv[1]))
    answer = run.answer_path(int(os.environ.get("RANK", "0")))
    with answering_failures(answer):
        write_answer(answer, train(run))


def train(run: TrainingRun) -> dict[str, Any]:
    """Run the steps of a request, and return what was measured."""
    with joined_world() as world:
        return _train(run, world)


def run_config(run: TrainingRun) -> RunConfig:
    """The configuration that a user would write for this run."""
    every_block = int(run.checkpoints_activations)
    return RunConfig.model_validate(
        {
            "run_dir": run.folder / "run",
            "num_steps": run.num_steps + run.is_profiled,
            "model": {
                "path": run.model,
                "precision": run.precision,
                "activation_checkpointing": {"encoder": every_block, "language_model": every_block},
                "cudnn_attention": run.cudnn_attention,
                "compile_blocks": run.compile_blocks,
                "float8": run.float8,
            },
            "trainable": {"lora": {} if run.lora else None},
            "train_data": {
                "shards": [run.shards],
                "slots_per_step": run.slots_per_step,
                "max_examples": run.batch_size,
                "num_workers": run.num_workers,
                "packing": run.packing,
                # The published collator tells the language of every utterance.
                "untagged_fraction": 0.0,
            },
            "optimizer": {
                "algorithm": run.optimizer,
                "master_weights": run.master_weights,
                "learning_rate": run.learning_rate,
                "weight_decay": run.weight_decay,
                "betas": [0.9, run.beta2],
                "warmup_steps": 0,
                "schedule": "constant",
            },
            "engine": {"fsdp2": {}} if run.fsdp2 else {"deepspeed": run.deepspeed},
        }
    )


def _train(run: TrainingRun, world: World) -> dict[str, Any]:
    config = run_config(run)
    prompts = VoxtralPrompts.from_pretrained(run.model)
    loader = build_train_loader(
        config.train_data,
        prompts,
        config.seed,
        config.num_steps,
        world.rank,
        world.size,
        pin_memory=world.device.type == "cuda",
    )
    # As in training, workers are started before the engine is built.
    steps = _rounds(loader, run)
    log_mel = LogMel.from_pretrained(run.model, world.device)
    before = status_bytes("VmRSS")
    engine = build_engine(config, log_mel, world, loader.training_set.max_windows_per_micro_batch)
    train_step = build_train_step(config, engine, world)
    meter, metered_audio = StepMeter(world.device), []
    meter.start()
    for _ in range(run.num_steps * run.num_rounds):
        metrics = train_step.run(next(steps)).metrics
        meter.step_ends()
        meter.losses.append(metrics.loss)
        metered_audio.append(metrics.audio_seconds)
    answer = meter.answer() | {"audio_seconds": metered_audio, "host_bytes_before_the_model": before}
    if run.profiles_kernels:
        answer["kernels"] = costliest_kernels(lambda: train_step.run(next(steps)), world.device)
    if run.is_profiled:
        answer["parts"] = StepParts(engine).of(lambda: next(steps), lambda batches: train_step.run(batches))
    return answer


def _rounds(loader: TrainLoader, run: TrainingRun) -> Iterator[StepBatches]:
    """The steps of all rounds, with the workers of each round started."""
    num_rounds = run.num_rounds + run.profiles_kernels
    num_steps = run.num_steps + run.is_profiled
    rounds = [_started(islice(loader.starting_at(0), num_steps)) for _ in range(num_rounds)]
    return chain.from_iterable(rounds)


def _started(steps: Iterator[StepBatches]) -> Iterator[StepBatches]:
    first = next(steps)
    return chain([first], steps)


if __name__ == "__main__":
    main()

"""One rank of this project's training on the shards of a request.

    torchrun benchmarks/rivals/voxtral_dist_training.py REQUEST

It is the loop of `voxtral_dist.train`: the same loader, engine and update, without checkpoints and evaluations.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from voxtral_dist.config import RunConfig
from voxtral_dist.data.loader import build_train_loader
from voxtral_dist.distributed.world import World, joined_world
from voxtral_dist.engine.build import build_engine
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.train import build_train_step

from rivals.training_runs import TrainingRun
from workloads.answers import answering_failures, write_answer
from workloads.step_meter import StepMeter
from workloads.step_parts import StepParts


def main() -> None:
    """Train, and write the answer."""
    run = TrainingRun.read(Path(sys.argv[1]))
    answer = run.answer_path(int(os.environ.get("RANK", "0")))
    with answering_failures(answer), joined_world() as world:
        write_answer(answer, _train(run, world))


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
    log_mel = LogMel.from_pretrained(run.model, world.device)
    engine = build_engine(config, log_mel, world, loader.training_set.max_windows_per_micro_batch)
    train_step = build_train_step(config, engine, world)
    steps = iter(loader.starting_at(0))
    meter, metered_audio = StepMeter(world.device), []
    meter.start()
    for _ in range(run.num_steps):
        metrics = train_step.run(next(steps)).metrics
        meter.step_ends()
        meter.losses.append(metrics.loss)
        metered_audio.append(metrics.audio_seconds)
    answer = meter.answer() | {"audio_seconds": metered_audio}
    if run.is_profiled:
        answer["parts"] = StepParts(engine).of(lambda: next(steps), lambda batches: train_step.run(batches))
    return answer


if __name__ == "__main__":
    main()

"""Start training runs of some steps, ours and the rival's, each in fresh processes, and read what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rivals.launch import REPOSITORY, SCRIPTS
from workloads.speech import ClipFile

TIME_LIMIT_SECONDS = 3600
LOG_CHARACTERS = 2000
OURS, TRAINER = "voxtral_dist_training.py", "trainer_voxtral.py"


@dataclass(frozen=True)
class TrainingRun:
    """Request for some training steps on the same utterances, for any trainer.

    model: a Voxtral folder.
    shards: the utterances packed, for ours.
    utterances: the same in the order of (step, slot), for the rival; each slot has `batch_size` of them.
    folder: an own one, for answers.
    deepspeed: DeepSpeed's file; None, and no `fsdp2`: no sharding.
    lora: adapters beside the linear layers of the language model, instead of all weights.
    optimizer: `adamw` or `adamw_8bit`.
    master_weights: ours alone: as in section `optimizer`.
    checkpoints_activations: of every block.
    packing: ours alone: utterances of a step share windows.
    num_rounds: how often the steps are run, each time on the same micro-batches.
    cudnn_attention: cuDNN's attention kernel may be used in the language model too.
    compile_blocks: ours alone: every block is compiled.
    float8: ours alone: as in section `model`.
    is_profiled: ours alone: one more step is taken apart.
    profiles_kernels: ours alone: the last step is profiled, and the answer names its costliest kernels.
    num_workers: processes of a rank that read batches ahead.
    max_tokens_per_second, max_new_tokens, weights_in_evaluations: of evaluations alone.
    """

    model: str
    shards: str
    utterances: tuple[ClipFile, ...]
    folder: Path
    world_size: int
    batch_size: int
    slots_per_step: int
    num_steps: int
    deepspeed: str | None = None
    fsdp2: bool = False
    precision: str = "float32"
    lora: bool = False
    optimizer: str = "adamw"
    master_weights: bool = True
    checkpoints_activations: bool = False
    packing: bool = False
    num_rounds: int = 1
    cudnn_attention: bool = False
    compile_blocks: bool = False
    float8: str | None = None
    is_profiled: bool = False
    profiles_kernels: bool = False
    num_workers: int = 0
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    beta2: float = 0.98
    max_tokens_per_second: float = 12.5
    max_new_tokens: int = 400
    weights_in_evaluations: str = "auto"

    @classmethod
    def read(cls, path: Path) -> TrainingRun:
        """Read the request that `ask` wrote."""
        request = json.loads(path.read_text(encoding="utf-8"))
        clips = tuple(ClipFile(**clip) for clip in request.pop("utterances"))
        return cls(**request | {"utterances": clips, "folder": Path(request["folder"])})

    def answer_path(self, rank: int) -> Path:
        """Path of a rank's answer."""
        return self.folder / f"answer-{rank}.json"

    def measure(self, script: str, number: int) -> list[dict[str, Any]]:
        """Collect the answer of each rank; see `ask`.

        Raises:
            RuntimeError: a rank has none.
        """
        answers = self.ask(script, number)
        for answer in answers:
            if "not_run" in answer:
                raise RuntimeError(f"{script}: {answer['not_run']}")
        return answers

    def ask(self, script: str, number: int) -> list[dict[str, Any]]:
        """Run and return the answer of each rank, or `{"not_run": reason}`; `number` counts repetitions."""
        mine = replace(self, folder=self.folder / f"{Path(script).stem}-{number}")
        mine.folder.mkdir(parents=True)
        request = mine.folder / "request.json"
        request.write_text(json.dumps(asdict(mine) | {"folder": str(mine.folder)}), encoding="utf-8")
        return mine._answers_of(script, request)

    def _answers_of(self, script: str, request: Path) -> list[dict[str, Any]]:
        # Its rendezvous takes a free port. A rank alone needs none.
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.world_size}"]
        launcher = torchrun if self.world_size > 1 else []
        command = [sys.executable, *launcher, str(SCRIPTS / script), str(request)]
        log = self.folder / "log.txt"
        with log.open("w", encoding="utf-8") as output:
            try:
                subprocess.run(
                    command,
                    stdout=output,
                    stderr=output,
                    timeout=TIME_LIMIT_SECONDS,
                    env=_variables(self.world_size),
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return [{"not_run": f"no answer in {TIME_LIMIT_SECONDS} s"}]
        return [self._answer(rank, log) for rank in range(self.world_size)]

    def _answer(self, rank: int, log: Path) -> dict[str, Any]:
        path = self.answer_path(rank)
        if not path.is_file():
            end = log.read_text(encoding="utf-8", errors="replace").strip()[-LOG_CHARACTERS:]
            return {"not_run": f"ended without an answer: {end}"}
        answer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return answer


def _variables(world_size: int) -> dict[str, str]:
    own = {
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{SCRIPTS.parent}",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # Threads of several ranks on the same cores would spin for each other.
    threads = {"OMP_NUM_THREADS": "1"} if world_size > 1 else {}
    return threads | os.environ | own

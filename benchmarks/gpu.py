# ruff: noqa: E402
"""One GPU: memory, speed and FLOPs utilization of fine-tuning Voxtral-Mini-3B, ours and Hugging Face's trainer.

    benchmarks/gpu.sh --output gpu.json [--minutes 9] [--only fsdp2,trainer] [--quick]

Random weights in the published shape (4.68 billion parameters), clips of 30 s with transcripts of about 60 tokens,
bfloat16, micro-batches of 8, one to a step. Contenders come in the order of their importance
(`workloads/gpu_contenders.py`), and one starts only if the time that was predicted for it is left. After each, the JSON
and a Markdown file beside it are replaced and a line is printed, so that whatever ends the run leaves what was measured
before. Out of memory, killed and too slow are results, after which the next contender starts.

One parent imports everything without touching the GPU, and forks each contender (`workloads/forks.py`). Weights are one
random block of 256 MB, repeated, in /dev/shm where it has room. Contenders run two rounds over the same five
micro-batches: the first meets every shape for the first time, the second is measured, data included. cuDNN's attention
kernel is off in the language model of both sides, as is our default, but for one pair.

The rate that utilization (MFU) is measured against is this GPU's on large products of random bfloat16 matrices, and in
parentheses that of its data sheet. The FLOPs of a step are those of `voxtral_dist.model.flops`, without padding and
without recomputation. Device memory is the peak of torch's tensors and of what torch reserved, loading included. Host
memory is what the whole machine holds more than before: the process, its data workers and what is pinned for them.

`ratio` is clips per second of ours over Hugging Face's trainer, full fine-tuning at batch 8, the fastest of each.
`--quick` runs all contenders on a CPU with a tiny model, and its figures mean nothing.

Predicted before any run, for one H200 (989 TFLOP/s by its data sheet), from a roofline of every kernel at batch 8 with
445 positions and 60 targets: 290 ms of kernels a micro-batch, 360 ms if all blocks are checkpointed, and an update of
105 ms, since a single GPU updates all 4.68 billion parameters by itself. So FSDP2, ZeRO-2 and ZeRO-3 reach 20 clips/s
and 32 % of the data sheet's rate, checkpointed 17 clips/s and 27 %, and LoRA, with half of the FLOPs, 45 clips/s.
Compiled blocks save 44 of 69 ms of element-wise kernels: 23 clips/s. Peaks by `voxtral-dist plan`: 116 GB (FSDP2), 105
(ZeRO-2), 121 (ZeRO-3); checkpointed 85, 105 and 90; LoRA 27; all offloaded 8, and 10 for 16 clips. 16 clips without
checkpointing need 148 GB and are not tried.

The trainer keeps weights, gradients and moments in bfloat16, 37 GB in place of 75, and loses small updates. Its update
moves 65 GB, about 20 ms, and logits of all positions cost it 3 % and 6 GB. So on a single GPU with one micro-batch a
step it is the faster one: 24 clips/s in 75 GB. Offloaded, a step moves 18.7 GB of gradients and updates on the host: 4
to 6 s, with 16 clips as well, so 1.6 and 3 clips/s. cuDNN's attention changes rates by less than 3 % where every shape
was met before; a new one costs 0.02 to 1 s. Its gradients are NaN at 448 and 576 positions with low scores and left
padding, and never without a mask.

Aims: full fine-tuning at batch 8 in less than 40 GB, and with everything offloaded in less than 16 GB; an MFU of at
least 45 %; at least 11 clips/s. No single contender can meet all of them: float32 states of all parameters alone are 75
GB, and 45 % is out of reach with one update per micro-batch.

The roofline that is part of `plan --gpu` now says, still before any run: 273 ms eager, 245 compiled, 342 checkpointed,
with 39 ms of casts under FSDP2 and 48 for the update: 22, 24 and 19 clips/s with one micro-batch a step. Compiled in
float8 237 ms. With bfloat16 weights, 8-bit moments and all blocks checkpointed and compiled, 376 ms in 36 GB.

Not yet measured.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
# torch then asks NVIDIA's management library whether there is a GPU: asking CUDA would spoil every fork.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# So would torchao, which transformers imports where it is installed: it asks CUDA what Triton can do.
sys.modules["torchao"] = None  # type: ignore[assignment]

import torch

from rivals import trainer_voxtral, voxtral_dist_training
from rivals.training_runs import OURS, TrainingRun
from workloads.device_checks import attention_facts, device_facts
from workloads.forks import Forks
from workloads.gpu_contenders import CONTENDERS, NUM_ROUNDS, NUM_STEPS, Contender, deepspeed_file
from workloads.gpu_inputs import CLIP_SECONDS, prepare
from workloads.gpu_results import Results
from workloads.speech import ClipFile

del sys.modules["torchao"]
# Each at its first use takes seconds: the parent does it once, for all forks.
IMPORTED = ("deepspeed", "peft", "voxtral_dist.engine.fsdp2.engine", "voxtral_dist.engine.zero.engine")
SHARED_MEMORY, ROOM_BYTES = Path("/dev/shm"), 12 * 10**9
# A contender that takes so many times its predicted seconds hangs. First builds of extensions are among them.
PATIENCE, LEAST_LIMIT_SECONDS, QUICK_LIMIT_SECONDS = 2.5, 60.0, 600.0
PREPARE_SECONDS, CHECK_SECONDS = 120.0, 90.0
EXIT_TERMINATED = 128 + signal.SIGTERM


class Terminated(BaseException):
    """SIGTERM or SIGINT came: what was measured is on disk."""


@dataclass(frozen=True)
class Options:
    """The command line.

    only: contenders to run; empty runs all.
    """

    output: Path
    minutes: float
    is_quick: bool
    only: frozenset[str]

    @classmethod
    def parse(cls) -> "Options":
        """Read the command line."""
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--output", type=Path, required=True, help="JSON file; the tables come beside it, as .md")
        parser.add_argument("--minutes", type=float, help="time for everything; the default is 9, or an hour if quick")
        parser.add_argument("--only", default="", help="names of contenders, with commas; the default is all")
        parser.add_argument("--quick", action="store_true", help="a smoke run on a tiny model; figures mean nothing")
        parsed = parser.parse_args()
        only = frozenset(parsed.only.split(",")) - {""}
        if unknown := only - set(CONTENDERS):
            parser.error(f"--only: {', '.join(sorted(unknown))}: the contenders are {', '.join(CONTENDERS)}")
        minutes = parsed.minutes or (60.0 if parsed.quick else 9.0)
        return cls(parsed.output, minutes, parsed.quick, only)

    def seconds_left(self) -> float:
        """Seconds until everything must be measured."""
        return 60 * self.minutes - (time.monotonic() - STARTED)

    def limit(self, predicted: float) -> float:
        """Seconds after which what was predicted to take some is killed."""
        patience = QUICK_LIMIT_SECONDS if self.is_quick else max(LEAST_LIMIT_SECONDS, PATIENCE * predicted)
        return max(1.0, min(self.seconds_left(), patience))


def main() -> int:
    """Measure as the command line says; the exit code of a run that was terminated is 143."""
    options = Options.parse()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _terminate)
    results = Results(options.output, STARTED)
    exit_code = 0
    try:
        with _folder(options) as folder:
            exit_code = _measure(options, results, folder)
    except Terminated:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        results.add(ended="by a signal")
        exit_code = EXIT_TERMINATED
    print(results.markdown(), flush=True)
    return exit_code


def _terminate(*_: object) -> None:
    raise Terminated


@contextmanager
def _folder(options: Options) -> Iterator[Path]:
    """A folder for weights and clips: in memory where there is room, so that loading does not wait for a disk."""
    has_room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > ROOM_BYTES
    options.output.parent.mkdir(parents=True, exist_ok=True)
    parent = SHARED_MEMORY if has_room and not options.is_quick else options.output.parent
    with tempfile.TemporaryDirectory(prefix="voxtral-dist-gpu-", dir=parent) as folder:
        yield Path(folder)


def _measure(options: Options, results: Results, folder: Path) -> int:
    for module in IMPORTED:
        __import__(module)
    results.add(import_seconds=time.monotonic() - STARTED)
    forks = Forks(folder)
    device = forks.run("device", device_facts, limit=options.limit(CHECK_SECONDS))
    if "not_run" in device and torch.cuda.is_available():
        forks = Forks(folder, method="spawn")
        device = forks.run("device", device_facts, limit=options.limit(CHECK_SECONDS))
    results.add(device=device, processes=forks.method)
    if "not_run" in device:
        print(f"The device cannot be used: {device['not_run']}", flush=True)
        return 1
    if device["type"] != "cuda" and not options.is_quick:
        reason = "DS_ACCELERATOR is cpu" if os.environ.get("DS_ACCELERATOR") == "cpu" else "this machine has no GPU"
        results.add(aims=f"not measured: {reason}")
        print(f"Not measured: {reason}.", flush=True)
        return 0
    results.add(attention=forks.run("attention", attention_facts, options.is_quick, limit=options.limit(CHECK_SECONDS)))
    prepared = forks.run("prepared", prepare, folder, options.is_quick, limit=options.limit(PREPARE_SECONDS))
    results.add(prepared={name: one for name, one in prepared.items() if name != "utterances"})
    if "not_run" in prepared:
        print(f"Nothing could be prepared: {prepared['not_run']}", flush=True)
        return 1
    schedule = _Schedule(options, forks, device, prepared, folder)
    for name in CONTENDERS:
        if not options.only or name in options.only:
            results.add_row(name, schedule.run(name))
    return 0


@dataclass(frozen=True)
class _Schedule:
    """What all contenders run on, and the time that is left for them."""

    options: Options
    forks: Forks
    device: Mapping[str, Any]
    prepared: Mapping[str, Any]
    folder: Path

    def run(self, name: str) -> dict[str, Any]:
        """The figures of a contender, or why there are none."""
        contender = CONTENDERS[name]
        if contender.needs and (find_spec(contender.needs) is None or self.device["type"] != "cuda"):
            return {"not_run": f"needs a GPU and the package {contender.needs}"}
        left = self.options.seconds_left()
        if left < contender.seconds:
            return {"not_run": f"predicted to take {contender.seconds:.0f} s, and {left:.0f} s were left"}
        train = voxtral_dist_training.train if contender.script == OURS else trainer_voxtral.train
        asked = self._asked(name, contender)
        answer = self.forks.run(name, train, asked, limit=self.options.limit(contender.seconds))
        return answer if "not_run" in answer else answer | self._rates(contender, answer)

    def _asked(self, name: str, contender: Contender) -> TrainingRun:
        settings = dict(contender.settings)
        folder = self.folder / name
        folder.mkdir()
        if "deepspeed" in settings:
            settings["deepspeed"] = deepspeed_file(settings["deepspeed"], folder)
        size = contender.batch_size_of(self.options.is_quick)
        num_steps = settings.get("num_steps", NUM_STEPS)
        clips = [ClipFile(**clip) for clip in self.prepared["utterances"][str(size)]]
        asked = TrainingRun(
            model=self.prepared["model"],
            shards=self.prepared["shards"],
            utterances=tuple(clips[: size * num_steps]),
            folder=folder,
            world_size=1,
            batch_size=size,
            slots_per_step=1,
            num_steps=NUM_STEPS,
            num_rounds=NUM_ROUNDS,
            precision="float32" if self.options.is_quick else "bfloat16",
            num_workers=0 if self.options.is_quick else 4,
        )
        return replace(asked, **settings)

    def _rates(self, contender: Contender, answer: Mapping[str, Any]) -> dict[str, Any]:
        seconds = answer["seconds"][-contender.num_measured :]
        size = contender.batch_size_of(self.options.is_quick)
        clips_per_second = size * len(seconds) / sum(seconds)
        flops = self.prepared["flops"][str(size)][bool(contender.settings.get("lora"))] * clips_per_second
        data_sheet = self.device["data_sheet_flops_per_second"]
        return {
            "step_seconds": sum(seconds) / len(seconds),
            "clips_per_second": clips_per_second,
            "audio_seconds_per_second": CLIP_SECONDS * clips_per_second,
            "model_flops_per_second": flops,
            "mfu": flops / self.device["matmul_flops_per_second"],
            "data_sheet_mfu": data_sheet and flops / data_sheet,
        }


if __name__ == "__main__":
    sys.exit(main())

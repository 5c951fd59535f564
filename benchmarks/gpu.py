"""One GPU: memory, speed and FLOPs utilisation of fine-tuning Voxtral-Mini-3B, ours and Hugging Face's trainer.

    python benchmarks/gpu.py --output gpu.json [--quick]

Random weights in the published shape (4.68 billion parameters), clips of 30 s with transcripts of about 100 tokens,
micro-batches of 4, 8 and 16, bfloat16, every contender in fresh processes. Out of memory is a result; larger batches of
that contender are then not tried. The rate that utilisation (MFU) is measured against is this very GPU's on large
products of bfloat16 matrices; the operations of a step are those of `voxtral_dist.model.flops`, without padding and
without what is computed again. `--quick` goes through all contenders on a CPU with a tiny model.

`ratio` is clips a second of ours over Hugging Face's trainer, full fine-tuning at batch 8, the fastest of each.

Aims: full fine-tuning at batch 8 in less than 40 GB, and with everything offloaded in less than 16 GB; an MFU of at
least 45 %; at least 11 clips a second. Published for Hugging Face's trainer with AdamW in 8 bits: about 47 GB at batch
4 and 80 GB at batch 8.

Predicted before any run, for an H100 of 80 GB: with AdamW in float32 ours keeps 75 GB (FSDP2) or 84 GB (ZeRO-2) of
weights, gradients and moments on a single rank, so it does not fit. The trainer keeps all of them in bfloat16, 37 GB,
or 28 GB with moments in 8 bits, and loses small updates. The aim of 40 GB is met by ours only with the optimizer
offloaded, 19 GB and checkpointed activations; its update on the host takes seconds, which misses both aims of speed. A
step of 8 clips is 0.12 PFLOP: 11 clips a second are 170 TFLOP/s, an MFU of about 25 % of what that card's products
reach, so 45 % is the harder aim.

Not yet measured.
"""

import json
import platform
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from voxtral_dist.config import LoraConfig, ModelConfig, TrainableConfig
from voxtral_dist.distributed.world import alone
from voxtral_dist.model.flops import BatchShape, TrainingFlops
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.voxtral import DTYPES, trained_meta_model

from rivals.launch import REPOSITORY
from rivals.training_runs import OURS, TRAINER, TrainingRun
from workloads.answers import OUT_OF_MEMORY
from workloads.command import run
from workloads.peak_memory import in_fresh_process
from workloads.random_weights import write_published_shape
from workloads.speech import ClipFiles, long_clips, source, write_clips, write_model

BATCH_SIZES = (4, 8, 16)
COMPARED_BATCH_SIZE = 8
CLIP_SECONDS = 30.0
NUM_WARM_UP_STEPS = 2
NEEDS_A_GPU = "AdamW in 8 bits needs a GPU"
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes", "peft", "flash-attn")
DEEPSPEED_FILES = REPOSITORY / "ds_configs"
ZERO2, ZERO3_OFFLOAD = (str(DEEPSPEED_FILES / f"{name}.json") for name in ("zero2", "zero3_offload"))
# Written by the benchmark into its own folder, and found there.
ZERO2_OFFLOAD = "zero2_offload.json"

# By contender and batch size.
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Contender:
    """A way to fine-tune: who trains, and the fields of its `TrainingRun`."""

    script: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        """Whether all weights are trained, and the device holds them."""
        return not self.settings.get("lora") and self.settings.get("deepspeed") != ZERO3_OFFLOAD

    @property
    def needs_gpu(self) -> bool:
        """Whether its optimizer does not run elsewhere."""
        return self.settings.get("optimizer") == "adamw_8bit"


CHECKPOINTED = {"checkpoints_activations": True}
IN_8_BITS = {"optimizer": "adamw_8bit"}
CONTENDERS = {
    "ours_zero2": Contender(OURS, {"deepspeed": ZERO2}),
    "ours_zero2_checkpointed": Contender(OURS, {"deepspeed": ZERO2, **CHECKPOINTED}),
    "ours_zero2_offloaded_optimizer": Contender(OURS, {"deepspeed": ZERO2_OFFLOAD, **CHECKPOINTED}),
    "ours_fsdp2": Contender(OURS, {"fsdp2": True}),
    "ours_fsdp2_checkpointed": Contender(OURS, {"fsdp2": True, **CHECKPOINTED}),
    "ours_zero3_offload": Contender(OURS, {"deepspeed": ZERO3_OFFLOAD, **CHECKPOINTED}),
    "ours_lora": Contender(OURS, {"deepspeed": ZERO2, "lora": True}),
    "trainer": Contender(TRAINER),
    "trainer_8bit": Contender(TRAINER, IN_8_BITS),
    "trainer_8bit_checkpointed": Contender(TRAINER, IN_8_BITS | CHECKPOINTED),
    "trainer_lora": Contender(TRAINER, {"lora": True}),
}


def measure(folder: Path, is_quick: bool) -> dict[str, Any]:
    """All contenders at all batch sizes."""
    batch_sizes, num_steps = ((1, 2), 3) if is_quick else (BATCH_SIZES, NUM_WARM_UP_STEPS + 8)
    device = in_fresh_process(_device)
    if not is_quick and device["type"] != "cuda":
        return _surroundings(device) | {"ratio": None, "aims": "not measured: this machine has no GPU"}
    model = write_model(folder / "model") if is_quick else write_published_shape(folder / "model")
    files = write_clips(folder / "corpus", long_clips(max(batch_sizes) * num_steps, CLIP_SECONDS))
    asked = TrainingRun(
        model=str(model),
        shards=str(files.corpus.shards),
        utterances=(),
        folder=folder,
        world_size=1,
        batch_size=0,
        slots_per_step=1,
        num_steps=num_steps,
        precision="float32" if is_quick else "bfloat16",
        num_workers=0 if is_quick else 4,
    )
    bench = _Bench(asked, files, tuple(batch_sizes[-1:] if is_quick else batch_sizes), device)
    # Quick figures mean nothing, so contenders may disturb each other.
    with ThreadPoolExecutor(2 if is_quick else 1) as pool:
        results = dict(zip(CONTENDERS, pool.map(bench.of, CONTENDERS), strict=True))
    compared = str(batch_sizes[-1] if is_quick else COMPARED_BATCH_SIZE)
    return {
        "ratio": _ratio(results, compared),
        "ratio_is": "clips a second of ours over Seq2SeqTrainer, full fine-tuning at batch 8, the fastest of each",
        "aims": _aims(results, compared),
        "contenders": results,
        **_surroundings(device),
    }


def _surroundings(device: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "device": device,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
        "source": source(),
        "clip_seconds": CLIP_SECONDS,
    }


@dataclass(frozen=True)
class _Bench:
    """What all contenders run on."""

    asked: TrainingRun
    files: ClipFiles
    batch_sizes: tuple[int, ...]
    device: Mapping[str, Any]

    def of(self, name: str) -> dict[str, dict[str, Any]]:
        """The figures of a contender by batch size, and why where there are none."""
        contender = CONTENDERS[name]
        if contender.needs_gpu and self.device["type"] != "cuda":
            return {str(size): {"not_run": NEEDS_A_GPU} for size in self.batch_sizes}
        rows = {str(self.batch_sizes[0]): self._figures(name, self.batch_sizes[0])}
        for smaller, size in pairwise(self.batch_sizes):
            is_full = rows[str(smaller)].get("not_run") == OUT_OF_MEMORY
            rows[str(size)] = {"not_run": OUT_OF_MEMORY} if is_full else self._figures(name, size)
        return rows

    def _figures(self, name: str, batch_size: int) -> dict[str, Any]:
        contender = CONTENDERS[name]
        asked = replace(
            self.asked,
            batch_size=batch_size,
            utterances=self.files.clips[: batch_size * self.asked.num_steps],
            folder=self.asked.folder / name,
            **contender.settings,
        )
        if asked.deepspeed == ZERO2_OFFLOAD:
            asked = replace(asked, deepspeed=str(_offloaded(self.asked.folder / ZERO2_OFFLOAD)))
        answer = asked.ask(contender.script, batch_size)[0]
        if "not_run" in answer:
            return answer
        seconds = statistics.median(answer["seconds"][NUM_WARM_UP_STEPS:])
        flops_per_second = self._flops(asked) / seconds
        return {
            "clips_per_second": batch_size / seconds,
            "audio_seconds_per_second": batch_size * CLIP_SECONDS / seconds,
            "model_flops_per_second": flops_per_second,
            "mfu": flops_per_second / self.device["matmul_flops_per_second"],
            "first_loss": answer["losses"][0],
            **answer,
        }

    def _flops(self, asked: TrainingRun) -> float:
        """FLOPs of an average step; the order of clips does not matter to it."""
        config = ModelConfig(path=asked.model, precision=asked.precision)
        trainable = TrainableConfig(lora=LoraConfig() if asked.lora else None)
        model = trained_meta_model(config, trainable, DTYPES[asked.precision])
        prompts = VoxtralPrompts.from_pretrained(asked.model)
        prompt = len(prompts.transcription("en", 1))
        completions = [len(prompts.completion(clip.text)) for clip in asked.utterances]
        # The last `</s>` is a target and no input.
        positions = [prompt + completion - 1 for completion in completions]
        shape = BatchShape.needed(len(completions), positions, sum(completions))
        return TrainingFlops(model, config).model(shape) / asked.num_steps


def _offloaded(path: Path) -> Path:
    """ZeRO-2 as elsewhere, with the optimizer's states and its update on the host."""
    settings = json.loads(Path(ZERO2).read_text(encoding="utf-8"))
    settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def _device() -> dict[str, Any]:
    """This machine's accelerator, and its rate on products of large matrices: the median of 20."""
    device = alone().device
    has_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if has_gpu else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [_seconds_of_product(left, right) for _ in range(25)][5:]
    return {
        "type": device.type,
        "name": torch.cuda.get_device_name() if has_gpu else platform.processor() or platform.machine(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if has_gpu else 0,
        "matmul_flops_per_second": 2 * size**3 / statistics.median(seconds),
        "matmul_size": size,
        "matmul_precision": str(dtype).removeprefix("torch."),
    }


def _seconds_of_product(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(left.device)
    started = time.perf_counter()
    left @ right
    _wait(left.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ratio(results: Results, batch_size: str) -> float | None:
    """None where one of both has no run that fits."""
    ours, theirs = (_full(results, script, batch_size, "clips_per_second") for script in (OURS, TRAINER))
    return max(ours.values()) / max(theirs.values()) if ours and theirs else None


def _aims(results: Results, batch_size: str) -> list[dict[str, Any]]:
    """What is aimed at, and the best of ours; None where it was not measured."""
    peaks, utilisation, rates = (
        _full(results, OURS, batch_size, key) for key in ("peak_device_bytes", "mfu", "clips_per_second")
    )
    offloaded = {"ours_zero3_offload": results["ours_zero3_offload"][batch_size].get("peak_device_bytes")}
    return [
        _aim("GB at batch 8, less than", 40, _lowest(peaks)),
        _aim("GB at batch 8 with everything offloaded, less than", 16, _lowest(offloaded)),
        _aim("MFU at batch 8, at least", 0.45, max(utilisation.items(), key=_value, default=None)),
        _aim("clips a second at batch 8, at least", 11, max(rates.items(), key=_value, default=None)),
    ]


def _aim(sentence: str, wanted: float, best: tuple[str, float] | None) -> dict[str, Any]:
    contender, measured = best or (None, None)
    return {"aim": sentence, "wanted": wanted, "measured": measured, "by": contender}


def _lowest(peaks: Mapping[str, float | None]) -> tuple[str, float] | None:
    """The contender that needs the least memory, and its gigabytes."""
    gigabytes = {name: size / 1e9 for name, size in peaks.items() if size is not None}
    return min(gigabytes.items(), key=_value, default=None)


def _value(named: tuple[str, float]) -> float:
    return named[1]


def _full(results: Results, script: str, batch_size: str, key: str) -> dict[str, float]:
    """A figure of every contender of one side that trains all weights on the device, where there is one."""
    names = [name for name, one in CONTENDERS.items() if one.script == script and one.is_full]
    rows = {name: results[name][batch_size] for name in names}
    return {name: row[key] for name, row in rows.items() if key in row}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    run(__doc__, measure, ("ratio", "aims", "device", "versions"))

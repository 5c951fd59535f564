"""The contenders of `gpu.py`, in the order of their importance, with what was predicted of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rivals.launch import REPOSITORY
from rivals.training_runs import OURS, TRAINER

NUM_STEPS, NUM_ROUNDS = 5, 2
COMPARED_BATCH_SIZE = 8
OFFLOADED = "zero3_offload"


@dataclass(frozen=True)
class Contender:
    """A way to fine-tune.

    title: for tables.
    script: which trainer.
    seconds: predicted for all of it, on one H200: loading, warming up and measuring.
    settings: fields of its `TrainingRun`; `deepspeed` is a name for `deepspeed_file`.
    clips_per_second: predicted rate.
    gigabytes: predicted peak of device memory.
    batch_size: clips of a micro-batch.
    """

    title: str
    script: str
    seconds: float
    settings: Mapping[str, Any]
    clips_per_second: float
    gigabytes: float
    batch_size: int = COMPARED_BATCH_SIZE

    @property
    def is_full(self) -> bool:
        """Whether it trains all weights, and the device holds them."""
        return not self.settings.get("lora") and self.settings.get("deepspeed") != OFFLOADED

    @property
    def needs(self) -> str | None:
        """The package without which it cannot run."""
        if self.settings.get("float8"):
            return "torchao"
        return "bitsandbytes" if self.script == TRAINER and self.settings.get("optimizer") == "adamw_8bit" else None

    @property
    def num_measured(self) -> int:
        """The last steps, which are measured: all of the last round, or all but the first step of a single round."""
        num_steps = int(self.settings.get("num_steps", NUM_STEPS))
        return num_steps if self.settings.get("num_rounds", NUM_ROUNDS) > 1 else num_steps - 1

    def batch_size_of(self, is_quick: bool) -> int:
        """Clips of a micro-batch; an eighth in a quick run."""
        return self.batch_size // COMPARED_BATCH_SIZE if is_quick else self.batch_size


_CHECKPOINTED = {"checkpoints_activations": True}
_FSDP2, _COMPILED = {"fsdp2": True}, {"compile_blocks": True}
# Three steps, in a single process: fewer copies of the weights in host memory.
_SHORT = {"num_steps": 3, "num_rounds": 1, "num_workers": 0}
_OFFLOAD = {"deepspeed": OFFLOADED, **_CHECKPOINTED, **_SHORT}
_PROFILED = {"num_steps": 2, "num_rounds": 1, "profiles_kernels": True}
CONTENDERS = {
    "fsdp2": Contender("ours, FSDP2", OURS, 25, _FSDP2, 20, 116),
    "trainer": Contender("`Seq2SeqTrainer`", TRAINER, 25, {}, 24, 75),
    "zero2": Contender("ours, ZeRO-2", OURS, 20, {"deepspeed": "zero2"}, 20, 105),
    "zero3": Contender("ours, ZeRO-3", OURS, 25, {"deepspeed": "zero3"}, 20, 121),
    "fsdp2_checkpointed": Contender("ours, FSDP2, checkpointed", OURS, 20, _FSDP2 | _CHECKPOINTED, 17, 85),
    "lora": Contender("ours, LoRA", OURS, 20, {"deepspeed": "zero2", "lora": True}, 45, 27),
    "trainer_lora": Contender("`Seq2SeqTrainer`, LoRA", TRAINER, 20, {"lora": True}, 40, 33),
    "fsdp2_kernels": Contender("ours, FSDP2, before one profiled step", OURS, 15, _FSDP2 | _PROFILED, 20, 116),
    "zero3_offload": Contender("ours, ZeRO-3, all offloaded, checkpointed", OURS, 75, _OFFLOAD, 1.6, 8),
    "zero3_offload_16": Contender("the same, batch of 16", OURS, 45, _OFFLOAD, 3, 10, batch_size=16),
    "fsdp2_compiled": Contender("ours, FSDP2, `compile_blocks`", OURS, 110, _FSDP2 | _COMPILED, 23, 110),
    "fsdp2_8bit": Contender(
        "ours, FSDP2, bfloat16 weights, 8-bit moments, compiled, checkpointed",
        OURS,
        110,
        _FSDP2 | _COMPILED | _CHECKPOINTED | {"optimizer": "adamw_8bit", "master_weights": False},
        21,
        36,
    ),
    "fsdp2_float8": Contender(
        "ours, FSDP2, compiled, float8", OURS, 130, _FSDP2 | _COMPILED | {"float8": "rowwise"}, 24, 110
    ),
    "fsdp2_cudnn": Contender("ours, FSDP2, cuDNN's attention", OURS, 25, _FSDP2 | {"cudnn_attention": True}, 20, 116),
    "trainer_cudnn": Contender("`Seq2SeqTrainer`, cuDNN's attention", TRAINER, 25, {"cudnn_attention": True}, 24, 75),
    "fsdp2_16": Contender(
        "ours, FSDP2, checkpointed, batch of 16", OURS, 30, _FSDP2 | _CHECKPOINTED, 19, 92, batch_size=16
    ),
    "trainer_16": Contender(
        "`Seq2SeqTrainer`, checkpointed, batch of 16", TRAINER, 30, _CHECKPOINTED, 21, 53, batch_size=16
    ),
    "trainer_checkpointed": Contender("`Seq2SeqTrainer`, checkpointed", TRAINER, 25, _CHECKPOINTED, 20, 45),
    "zero3_checkpointed": Contender(
        "ours, ZeRO-3, checkpointed", OURS, 25, {"deepspeed": "zero3"} | _CHECKPOINTED, 17, 90
    ),
    "trainer_8bit": Contender("`Seq2SeqTrainer`, 8-bit AdamW", TRAINER, 25, {"optimizer": "adamw_8bit"}, 23, 66),
    "zero2_offloaded_optimizer": Contender(
        "ours, ZeRO-2, optimizer offloaded, checkpointed",
        OURS,
        60,
        {"deepspeed": "zero2_offload"} | _CHECKPOINTED | _SHORT,
        1.8,
        50,
    ),
}


def deepspeed_file(name: str, folder: Path) -> str:
    """Write the settings of `ds_configs` under a name into a folder, for this machine, and return the path.

    `zero2_offload` is ZeRO-2 with the optimizer's states and its update on the host. Offloaded tensors are pinned only
    where torch can do it without rounding them up to powers of two, by which 17 GB take 32; 2.11 cannot.
    """
    published, _, offload = name.partition("_")
    source = name if (REPOSITORY / "ds_configs" / f"{name}.json").is_file() else published
    settings = json.loads((REPOSITORY / "ds_configs" / f"{source}.json").read_text(encoding="utf-8"))
    zero = settings["zero_optimization"]
    if offload:
        zero.setdefault("offload_optimizer", {"device": "cpu"})
    for key in ("offload_optimizer", "offload_param"):
        if key in zero:
            zero[key]["pin_memory"] = pins_without_rounding()
    path = folder / f"{name}.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return str(path)


def pins_without_rounding() -> bool:
    """Whether this torch knows `pinned_max_round_threshold_mb`."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return (major, minor) >= (2, 13)

"""One rank of Hugging Face's `Seq2SeqTrainer` on the utterances of a request, as published scripts fine-tune Voxtral.

    torchrun benchmarks/rivals/trainer_voxtral.py REQUEST

The collator is `transcription_collator.py`; sharding is DeepSpeed by the file that ours uses, filled up as Hugging
Face's documentation says, or FSDP2 by accelerate; the optimizer is the trainer's own AdamW, fused, or that of
bitsandbytes with 8 bits. cuDNN's attention is used where ours uses it. Utterances come in the order of the request, so
that every micro-batch is the same as ours.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    VoxtralForConditionalGeneration,
)

from voxtral_dist.distributed.world import alone
from voxtral_dist.model.attention import without_cudnn

from rivals.training_runs import TrainingRun
from rivals.transcription_collator import TranscriptionCollator
from workloads.answers import answering_failures, write_answer
from workloads.peak_memory import status_bytes
from workloads.step_meter import StepMeter

LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WRAPPED_LAYERS = ["VoxtralEncoderLayer", "LlamaDecoderLayer"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Train, and write the answer."""
    run = TrainingRun.read(Path(sys.argv[1]))
    answer = run.answer_path(int(os.environ.get("RANK", "0")))
    with answering_failures(answer):
        write_answer(answer, train(run))


def train(run: TrainingRun) -> dict[str, Any]:
    """Run the steps of a request, and return what was measured."""
    if run.fsdp2:
        _shard_on_cpus_too()
    arguments = _arguments(run)
    meter = StepMeter(arguments.device)
    before = status_bytes("VmRSS")
    trainer = Seq2SeqTrainer(
        model=_model(run),
        args=arguments,
        train_dataset=[vars(one) for one in run.utterances * run.num_rounds],
        data_collator=_Collator(run.model),
        callbacks=[_Metered(meter)],
    )
    trainer.train()
    if run.fsdp2 and not isinstance(trainer.model, FSDPModule):
        raise RuntimeError("The trainer was asked for FSDP2, but trained without it.")
    return meter.answer() | {"host_bytes_before_the_model": before}


def _shard_on_cpus_too() -> None:
    """Make accelerate use FSDP2 on CPUs, where it silently falls back to plain DDP."""
    original = AcceleratorState.__init__

    def begin(state: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **named: Any) -> None:
        original(state, *arguments, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = begin


def _arguments(run: TrainingRun) -> Seq2SeqTrainingArguments:
    sharding: dict[str, Any] = {}
    if run.deepspeed is not None:
        sharding["deepspeed"] = filled_up(run.deepspeed)
    elif run.fsdp2:
        wrapping = {"version": 2, "transformer_layer_cls_to_wrap": WRAPPED_LAYERS, "reshard_after_forward": True}
        sharding |= {"fsdp": True, "fsdp_config": wrapping}
    return Seq2SeqTrainingArguments(
        output_dir=str(run.folder / "trainer"),
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=run.slots_per_step // run.world_size,
        max_steps=run.num_steps * run.num_rounds,
        learning_rate=run.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=run.weight_decay,
        adam_beta2=run.beta2,
        optim="adamw_bnb_8bit" if run.optimizer == "adamw_8bit" else "adamw_torch_fused",
        bf16=run.precision == "bfloat16",
        use_cpu=alone().device.type == "cpu",
        gradient_checkpointing=run.checkpoints_activations,
        train_sampling_strategy="sequential",
        dataloader_num_workers=run.num_workers,
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **sharding,
    )


def filled_up(path: str) -> dict[str, Any]:
    """DeepSpeed's settings, with `auto` where the trainer fills values in."""
    settings: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return settings | dict.fromkeys(automatic, "auto") | {"bf16": {"enabled": "auto"}}


def _model(run: TrainingRun) -> torch.nn.Module:
    model = VoxtralForConditionalGeneration.from_pretrained(run.model, dtype=DTYPES[run.precision])
    if not run.cudnn_attention:
        for block in model.model.language_model.layers:
            block.forward = without_cudnn()(block.forward)
    if not run.lora:
        return model
    import peft

    pattern = rf".*language_model.*\.({'|'.join(LORA_LAYERS)})"
    return peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=pattern))


class _Collator:
    """Collator that reads the audio of a micro-batch, as a Hugging Face dataset does on access."""

    def __init__(self, model: str) -> None:
        self._collator = TranscriptionCollator(model)

    def __call__(self, utterances: Sequence[dict[str, str]]) -> dict[str, Tensor]:
        waveforms = [soundfile.read(one["audio"], dtype="float32")[0] for one in utterances]
        return self._collator(waveforms, [one["text"] for one in utterances], ["en"] * len(utterances))


class _Metered(TrainerCallback):
    """Callback that reports the end and the loss of each step to the meter."""

    def __init__(self, meter: StepMeter) -> None:
        self._meter = meter

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._meter.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._meter.step_ends()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self._meter.losses.append(float(logs["loss"]))


if __name__ == "__main__":
    main()

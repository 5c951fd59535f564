"""The inputs of `gpu.py`: a model, clips, and what each step is made of."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from voxtral_dist.config import LoraConfig, ModelConfig, TrainableConfig, TrainDataConfig
from voxtral_dist.data.training_set import build_training_set
from voxtral_dist.model.flops import BatchShape, TrainingFlops
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.voxtral import DTYPES, trained_meta_model

from workloads.gpu_contenders import CONTENDERS, NUM_STEPS
from workloads.random_weights import write_published_shape
from workloads.speech import ClipFile, long_clips, write_clips, write_model

CLIP_SECONDS = 30.0


def prepare(folder: Path, is_quick: bool) -> dict[str, Any]:
    """Write a model and clips, and say by batch size which clips the steps of ours have, and the FLOPs of one clip.

    The FLOPs are those of training all weights and of LoRA.
    """
    model = write_model(folder / "model") if is_quick else write_published_shape(folder / "model")
    sizes = sorted({one.batch_size_of(is_quick) for one in CONTENDERS.values()})
    files = write_clips(folder / "corpus", long_clips(sizes[-1] * NUM_STEPS, CLIP_SECONDS))
    prompts = VoxtralPrompts.from_pretrained(str(model))
    batches = {size: _batches(str(files.corpus.shards), prompts, size) for size in sizes}
    clips = {size: [files.clips[number] for ids in batches[size] for number in ids] for size in sizes}
    return {
        "model": str(model),
        "shards": str(files.corpus.shards),
        "utterances": {size: [asdict(clip) for clip in clips[size]] for size in sizes},
        "flops": {
            size: [_flops(str(model), prompts, clips[size], has_lora) for has_lora in (False, True)] for size in sizes
        },
    }


def _batches(shards: str, prompts: VoxtralPrompts, batch_size: int) -> list[tuple[int, ...]]:
    """The clips of each step of ours, which the trainer takes in the same order."""
    data = TrainDataConfig(shards=(shards,), slots_per_step=1, max_examples=batch_size, untagged_fraction=0.0)
    plan = build_training_set(data, prompts, seed=0).plan
    batches = [plan.slot(step, 0).utterance_ids for step in range(NUM_STEPS)]
    if any(len(ids) != batch_size for ids in batches):
        raise RuntimeError(f"The plan has micro-batches of {list(map(len, batches))} clips instead of {batch_size}.")
    return batches


def _flops(model_path: str, prompts: VoxtralPrompts, clips: list[ClipFile], has_lora: bool) -> float:
    """Model FLOPs of an average clip."""
    config = ModelConfig(path=model_path, precision="bfloat16")
    model = trained_meta_model(config, TrainableConfig(lora=LoraConfig() if has_lora else None), DTYPES["bfloat16"])
    prompt = len(prompts.transcription("en", 1))
    completions = [len(prompts.completion(clip.text)) for clip in clips]
    # The last `</s>` is a target and no input.
    positions = [prompt + completion - 1 for completion in completions]
    return TrainingFlops(model, config).model(BatchShape.needed(len(clips), positions, sum(completions))) / len(clips)

"""A tiny Voxtral that knows a few utterances by heart: its hypotheses end by themselves, at different lengths."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from voxtral_dist.config import ModelConfig
from voxtral_dist.data.batches import collate
from voxtral_dist.data.features import LogMel
from voxtral_dist.data.index import read_index
from voxtral_dist.data.prompts import VoxtralPrompts
from voxtral_dist.data.samples import SampleReader
from voxtral_dist.engine.loss import LossOfMicroBatch
from voxtral_dist.weights import load_voxtral

NUM_STEPS = 120
LEARNING_RATE = 4e-3


def fit(model_path: Path, shards: Path, num_utterances: int, out_dir: Path) -> None:
    """Train on the first utterances of a set, all in one batch, and save a Hugging Face folder."""
    prompts = VoxtralPrompts.from_pretrained(str(model_path))
    reader = SampleReader(read_index([shards]), prompts, max_target_tokens=None, max_chars_per_second=None)
    batch = collate(
        [reader.example(number) for number in range(num_utterances)], prompts.pad_id, prompts.window_samples
    )
    model = load_voxtral(ModelConfig(path=str(model_path), precision="float32"))
    loss = LossOfMicroBatch(LogMel.from_pretrained(str(model_path), torch.device("cpu")), 2048)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    for _ in range(NUM_STEPS):
        (loss(model, batch) / batch.num_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    shutil.copytree(model_path, out_dir)
    model.save_pretrained(out_dir)

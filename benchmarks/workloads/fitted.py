"""A tiny Voxtral trained on some utterances until its transcripts end by themselves, at different lengths."""

from __future__ import annotations

import shutil
from itertools import cycle, islice
from pathlib import Path

import torch

from voxtral_dist.config import ModelConfig
from voxtral_dist.data.examples.micro_batch import MicroBatch, collate
from voxtral_dist.data.examples.reader import UtteranceReader
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.engine.loss import LossOfMicroBatch
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.weights import load_voxtral

LEARNING_RATE = 4e-3


def fit(model_path: Path, shards: Path, out_dir: Path, *, num_utterances: int, batch_size: int, num_steps: int) -> None:
    """Train on the first utterances of a set, by one process, and save a Hugging Face folder."""
    prompts = VoxtralPrompts.from_pretrained(str(model_path))
    batches = _batches(shards, prompts, num_utterances, batch_size)
    model = load_voxtral(ModelConfig(path=str(model_path), precision="float32"))
    loss = LossOfMicroBatch(LogMel.from_pretrained(str(model_path), torch.device("cpu")), 2048)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    for batch in islice(cycle(batches), num_steps):
        (loss(model, batch) / batch.num_target_tokens).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    shutil.copytree(model_path, out_dir)
    model.save_pretrained(out_dir)


def _batches(shards: Path, prompts: VoxtralPrompts, num_utterances: int, batch_size: int) -> list[MicroBatch]:
    reader = UtteranceReader(read_index([str(shards)]), prompts, max_target_tokens=None, takes_all=True)
    examples = [reader.example(number) for number in range(num_utterances)]
    return [collate(examples[first : first + batch_size], prompts) for first in range(0, num_utterances, batch_size)]

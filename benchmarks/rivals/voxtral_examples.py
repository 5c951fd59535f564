"""Batches as scripts that fine-tune Voxtral on one GPU make them: `VoxtralProcessor` for the prompt and the features.

Prompt and features of the whole batch come from `apply_transcription_request`; the transcript and `</s>` are put behind
each prompt, rows are padded, and everything that is not transcript is masked in the labels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import VoxtralProcessor

from measure import Request

SAMPLING_RATE = 16_000
SHUFFLE_BUFFER = 100
SEED = 0
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Clip:
    """One utterance as the frameworks deliver it: encoded audio and its text."""

    key: str
    audio: bytes
    text: str
    language: str | None

    def waveform(self) -> NDArray[np.float32]:
        """The waveform, decoded by soundfile."""
        samples: NDArray[np.float32] = soundfile.read(io.BytesIO(self.audio), dtype="float32")[0]
        return samples


def clip_of_members(key: str, audio: bytes, fields: bytes | dict[str, Any]) -> Clip:
    """The members of a WebDataset sample as a clip."""
    parsed = json.loads(fields) if isinstance(fields, bytes) else fields
    return Clip(key, audio, parsed["text"], parsed["lang"])


class VoxtralPath:
    """Last part of all rivals' data paths: decoding and collation."""

    def __init__(self, request: Request) -> None:
        torch.set_num_threads(1)
        self.request = request
        self.examples_per_batch = request.batch_size
        self._processor = VoxtralProcessor.from_pretrained(request.model)
        self._text = self._processor.tokenizer.tokenizer.instruct_tokenizer.tokenizer

    def prepare(self) -> dict[str, Any]:
        """Convert nothing: most frameworks read the tars as they are."""
        return {}

    def keys(self, batch: Sequence[Clip]) -> list[str]:
        """Keys in the order of the batch."""
        return [clip.key for clip in batch]

    def collate(self, batch: Sequence[Clip]) -> tuple[int, float]:
        """Make the tensors. Returns the number of examples and their audio in seconds."""
        waveforms = [clip.waveform() for clip in batch]
        self.tensors(waveforms, batch)
        return len(batch), sum(len(waveform) for waveform in waveforms) / SAMPLING_RATE

    def tensors(self, waveforms: Sequence[NDArray[np.float32]], clips: Sequence[Clip]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` `(B, T)` and `input_features` `(C, M, F)`."""
        prompts = self._processor.apply_transcription_request(
            audio=list(waveforms),
            model_id=self.request.model,
            language=[clip.language for clip in clips],
            sampling_rate=SAMPLING_RATE,
            format=["WAV"] * len(clips),
            return_tensors="pt",
        )
        rows = [
            prompt[mask.bool()].tolist()
            for prompt, mask in zip(prompts["input_ids"], prompts["attention_mask"], strict=True)
        ]
        completions = [self._text.encode(clip.text, bos=False, eos=True) for clip in clips]
        width = max(len(row) + len(completion) for row, completion in zip(rows, completions, strict=True))
        input_ids = torch.full((len(clips), width), int(self._text.pad_id))
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        for number, (row, completion) in enumerate(zip(rows, completions, strict=True)):
            end = len(row) + len(completion)
            input_ids[number, :end] = torch.tensor(row + completion)
            attention_mask[number, :end] = 1
            labels[number, len(row) : end] = torch.tensor(completion)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "input_features": prompts["input_features"],
        }

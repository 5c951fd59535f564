"""A collator for Hugging Face's `Trainer` as published scripts that fine-tune Voxtral write it.

After `VoxtralCollatorTranscriptionTask` of the package `voxtral_finetune`: the prompt and the features come from
`apply_transcription_request`, the transcript from a chat with a mock question, cut behind `[/INST]`.

It differs in one place. The published one asks for the chat with `continue_final_message`, which in the transformers of
today leaves out `</s>`, so that a model would never learn to stop; here the tokenizer is in its mode for fine-tuning,
which keeps it and takes no longer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import VoxtralProcessor

from voxtral_dist.data.examples.micro_batch import IGNORED_LABEL
from voxtral_dist.model.voxtral import HOP_SAMPLES, read_voxtral_config, window_samples

from workloads.speech import SAMPLING_RATE

END_OF_INSTRUCTION = 4
TRANSCRIBE = 34


class TranscriptionCollator:
    """Collator with the processor of one model folder."""

    def __init__(self, model: str) -> None:
        self._model = model
        # The published window is the default.
        num_samples = window_samples(read_voxtral_config(model))
        self._window = {"pad_to_multiple_of": num_samples, "max_source_positions": num_samples // HOP_SAMPLES}
        self.processor = VoxtralProcessor.from_pretrained(model, mode="finetuning")
        self._tokenizer = self.processor.tokenizer
        self._tokenizer.padding_side = "left"

    def __call__(
        self, waveforms: Sequence[NDArray[np.float32]], texts: Sequence[str], languages: Sequence[str]
    ) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` `(B, T)` and `input_features` `(C, M, F)`."""
        prompts = self.processor.apply_transcription_request(
            language=list(languages),
            audio=list(waveforms),
            model_id=self._model,
            sampling_rate=SAMPLING_RATE,
            format=["WAV"] * len(waveforms),
            audio_kwargs=self._window,
            return_tensors="pt",
        )
        rows = [
            torch.cat([prompt, completion])
            for prompt, completion in zip(prompts["input_ids"], self._completions(texts), strict=True)
        ]
        input_ids = self._tokenizer.pad({"input_ids": rows}, padding="longest", return_tensors="pt")["input_ids"]
        is_start = (input_ids == TRANSCRIBE).long()
        is_prompt = is_start.cumsum(dim=1) - is_start == 0
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != self._tokenizer.pad_token_id).long(),
            "labels": input_ids.masked_fill(is_prompt, IGNORED_LABEL),
            "input_features": prompts["input_features"],
        }

    def _completions(self, texts: Sequence[str]) -> list[Tensor]:
        chats = [
            [{"role": "user", "content": "Some mock text"}, {"role": "assistant", "content": text}] for text in texts
        ]
        ids = self._tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt")["input_ids"]
        ends = (ids == END_OF_INSTRUCTION).nonzero(as_tuple=True)[1].tolist()
        return [row[end + 1 :] for row, end in zip(ids, ends, strict=True)]

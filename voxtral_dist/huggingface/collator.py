"""Batches of rows of a `datasets.Dataset` for `VoxtralForConditionalGeneration`.

B rows   T token ids   C encoder windows of all rows   M mel bins   F frames of a window
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from voxtral_dist.data.examples.audio_inputs import pcm_of
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.micro_batch import IGNORED_LABEL, pad_left, windows_of
from voxtral_dist.data.stored.audio import AudioError
from voxtral_dist.errors import UserError
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.output.counting import counted
from voxtral_dist.text.languages import language_code


class TranscriptionCollator:
    """A data collator with the prompts, the labels and the features that voxtral-dist itself trains on.

    `Trainer` drops the columns that `forward` does not name, audio and text among them: set
    `remove_unused_columns=False`.

    Example:
        >>> from voxtral_dist import ShardDataset, TranscriptionCollator
        >>> collator = TranscriptionCollator.from_pretrained("models/tiny")
        >>> rows = ShardDataset("shards/speech")
        >>> batch = collator([rows[0], rows[1]])
        >>> sorted(batch)
        ['attention_mask', 'input_features', 'input_ids', 'labels']
        >>> batch["labels"].shape == batch["input_ids"].shape
        True
    """

    def __init__(
        self,
        prompts: VoxtralPrompts,
        log_mel: LogMel,
        *,
        audio_column: str = "audio",
        text_column: str = "text",
        language_column: str = "language",
    ) -> None:
        """A collator of one model.

        Args:
            prompts: make the token ids.
            log_mel: makes the features, on the CPU.
            audio_column: of audio in any form that `datasets` gives it, resampled where its rate is not the model's.
            text_column: of transcripts.
            language_column: of ISO 639-1 codes, locales or English names. Where it is absent or None, the prompt omits
                the language.
        """
        self.prompts = prompts
        self._log_mel = log_mel
        self._audio_column = audio_column
        self._text_column = text_column
        self._language_column = language_column

    @classmethod
    def from_pretrained(cls, path: str, **columns: str) -> TranscriptionCollator:
        """The collator of a Hugging Face folder or hub name.

        Args:
            path: of the model.
            columns: names of columns, as for the constructor.

        Raises:
            UserError: the path leads to no Voxtral, or lacks its tokenizer or its feature extractor.

        Example:
            >>> from voxtral_dist import TranscriptionCollator
            >>> collator = TranscriptionCollator.from_pretrained("models/tiny", text_column="sentence")
        """
        log_mel = LogMel.from_pretrained(path, torch.device("cpu"))
        return cls(VoxtralPrompts.from_pretrained(path), log_mel, **columns)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch, padded on the left.

        Args:
            rows: each with audio and text, and with a language where it is known.

        Returns:
            `input_ids`: int64 `(B, T)`: prompt and completion with its `</s>`. `attention_mask`: int64 `(B, T)`.
            `labels`: int64 `(B, T)`: the ids of completions, -100 elsewhere. `input_features`: float32 `(C, M, F)`.

        Raises:
            UserError: the audio, the text or the language of a row cannot be used.
        """
        examples = [self._example(row) for row in rows]
        pad_id = self.prompts.pad_id
        input_ids, attention_mask = pad_left([(*one.prompt, *one.completion) for one in examples], pad_id)
        ignored = [[IGNORED_LABEL] * len(one.prompt) for one in examples]
        labels, _ = pad_left(
            [(*prompt, *one.completion) for prompt, one in zip(ignored, examples, strict=True)], IGNORED_LABEL
        )
        pcm = windows_of(examples, self.prompts.window_samples)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "input_features": self._log_mel(pcm, [one.num_windows for one in examples]),
        }

    def _example(self, row: Mapping[str, Any]) -> Example:
        pcm, text = self._pcm(row), self._text(row)
        num_windows = self.prompts.num_windows(len(pcm))
        example = Example(
            utterance_id=0,
            key="",
            pcm=pcm,
            num_windows=num_windows,
            prompt=self.prompts.transcription(self._language(row), num_windows),
            completion=tuple(self.prompts.completion(text)),
            reference=text,
            duration_seconds=len(pcm) / self.prompts.sampling_rate,
        )
        num_tokens = len(example.prompt) + len(example.completion)
        if num_tokens > self.prompts.max_positions:
            raise UserError(
                f"A row of {example.duration_seconds:.0f} s with the text {_beginning(text)} takes "
                f"{counted(num_tokens, 'position')}, but the model has {self.prompts.max_positions}: cut its audio, "
                "or filter such rows."
            )
        return example

    def _pcm(self, row: Mapping[str, Any]) -> Any:
        audio = self._value(row, self._audio_column)
        try:
            return pcm_of(audio, self.prompts.sampling_rate)
        except AudioError as error:
            text = row.get(self._text_column)
            raise UserError(f"The audio of the row with the text {_beginning(text)} {error}.") from error

    def _text(self, row: Mapping[str, Any]) -> str:
        text = self._value(row, self._text_column)
        if not isinstance(text, str):
            raise UserError(f"The column `{self._text_column}` must hold texts, but holds {text!r}.")
        return text

    def _language(self, row: Mapping[str, Any]) -> str | None:
        try:
            return language_code(row.get(self._language_column))
        except ValueError as error:
            raise UserError(f"The row with the text {_beginning(row[self._text_column])} {error}.") from error

    def _value(self, row: Mapping[str, Any], column: str) -> Any:
        if column not in row:
            raise UserError(
                f"A row has no column `{column}`, only {', '.join(map(repr, row)) or 'none'}: set "
                "`remove_unused_columns=False` in TrainingArguments, or name the column."
            )
        return row[column]


def _beginning(text: object) -> str:
    """A text as a message quotes it."""
    return repr(text if len(str(text)) <= 40 else f"{str(text)[:40]}...")

"""Token ids of a transcription: Mistral's own prompt, the transcript behind it, and the way back to text."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import soundfile
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.transcription.request import TranscriptionRequest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from pydantic import ValidationError
from transformers import MistralCommonBackend

from voxtral_dist.errors import UserError, first_line

# The published model may begin its answer with the language it heard, as in "lang:en".
_LANGUAGE_TAG = re.compile(r"^\s*lang:[a-z]{2}\b\s?")


class TranscriptionPrompts:
    """The tokenizer of one Voxtral checkpoint, as far as transcription needs it.

    A prompt depends on the language and the number of windows alone, so each is built once by mistral-common's
    `encode_transcription` on silence, and audio is never encoded to be decoded again.
    """

    def __init__(self, tokenizer: MistralTokenizer) -> None:
        self._instruct = tokenizer.instruct_tokenizer
        self._text = self._instruct.tokenizer
        if self._instruct.audio_encoder is None:
            raise UserError("The tokenizer has no `audio` section: `model.path` must lead to a Voxtral checkpoint.")
        self._audio_config = self._instruct.audio_encoder.audio_config
        self._prompt = lru_cache(maxsize=4096)(self._build_prompt)

    @classmethod
    def from_pretrained(cls, path: str) -> TranscriptionPrompts:
        """The prompts of a Hugging Face folder or hub name.

        Raises:
            UserError: there is no `tekken.json`, or it is not Voxtral's.
        """
        _check_folder(path)
        try:
            return cls(MistralCommonBackend.from_pretrained(path).tokenizer)
        except (OSError, ValueError, KeyError, AssertionError, MistralCommonException) as error:
            raise UserError(
                f"`model.path`: {path!r} has no usable tokenizer ({type(error).__name__}: {first_line(error)})."
            ) from error

    @property
    def sampling_rate(self) -> int:
        """Of the audio that the model takes, in Hz."""
        return int(self._audio_config.sampling_rate)

    @property
    def window_samples(self) -> int:
        """Audio samples of one window of the encoder: 480,000 for 30 s."""
        return int(self._audio_config.chunk_frames)

    @property
    def window_seconds(self) -> float:
        """The length of a window."""
        return self.window_samples / self.sampling_rate

    @property
    def num_mel_bins(self) -> int:
        """Of the features that the encoder takes."""
        return int(self._audio_config.encoding_config.num_mel_bins)

    @property
    def hop_samples(self) -> int:
        """Audio samples from one frame of the features to the next."""
        return int(self._audio_config.encoding_config.hop_length)

    @cached_property
    def audio_tokens_per_window(self) -> int:
        """Positions of the language model that one window takes: 375 for 30 s."""
        audio_id = self._instruct.audio_encoder.audio_token
        return sum(token == audio_id for token in self.prompt(None, 1))

    @property
    def pad_id(self) -> int:
        """Fills prompts on the left."""
        return int(self._text.pad_id)

    @property
    def eos_id(self) -> int:
        """`</s>`, the end of every completion."""
        return int(self._text.eos_id)

    def num_windows(self, num_samples: int) -> int:
        """Windows that audio of this many samples fills; the last one is padded with silence."""
        return -(-num_samples // self.window_samples)

    def prompt(self, language: str | None, num_windows: int) -> tuple[int, ...]:
        """The ids up to and with `[TRANSCRIBE]`; without a language the model is asked to detect it.

        Raises:
            ValueError: mistral-common doesn't know the language as an ISO 639-1 code.
        """
        ids: tuple[int, ...] = self._prompt(language, num_windows)
        return ids

    def completion(self, text: str) -> list[int]:
        """The ids of a transcript and `</s>`. Text that looks like a special token stays text."""
        ids: list[int] = self._text.encode(text, bos=False, eos=True)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The transcript in generated ids: without special tokens and without the tag of a detected language."""
        text: str = self._text.decode(list(ids), special_token_policy=SpecialTokenPolicy.IGNORE)
        return _LANGUAGE_TAG.sub("", text, count=1).strip()

    def _build_prompt(self, language: str | None, num_windows: int) -> tuple[int, ...]:
        silence = np.zeros(num_windows * self.window_samples, dtype=np.int16)
        wav = io.BytesIO()
        soundfile.write(wav, silence, self.sampling_rate, format="WAV", subtype="PCM_16")
        audio = base64.b64encode(wav.getvalue()).decode("ascii")
        try:
            request = TranscriptionRequest(audio=audio, language=language)
        except ValidationError as error:
            raise ValueError(f"has the language {language!r}, which is not an ISO 639-1 code such as 'en'") from error
        return tuple(self._instruct.encode_transcription(request).tokens)


def _check_folder(path: str) -> None:
    """Refuse what cannot be a hub name and is not a Voxtral folder either."""
    folder = Path(path)
    if not folder.is_dir() and (folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1):
        raise UserError(f"`model.path`: the folder {path} does not exist: give a Voxtral folder or a hub name.")
    for name in ("tekken.json", "config.json"):
        if folder.is_dir() and not (folder / name).is_file():
            raise UserError(f"The model folder {path} has no {name}: `model.path` must lead to a Voxtral checkpoint.")

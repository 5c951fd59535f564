"""Voxtral's prompts and completions as token ids in Mistral's formats, and the decoding of answers.

    transcription   <s>[INST][BEGIN_AUDIO][AUDIO]...CONTEXT[/INST]lang:en[TRANSCRIBE]   TRANSCRIPT</s>
    detection       <s>[INST][BEGIN_AUDIO][AUDIO]...CONTEXT[/INST][TRANSCRIBE]          lang:enTRANSCRIPT</s>
    instruction     <s>[INST][BEGIN_AUDIO][AUDIO]...INSTRUCTION[/INST]                  ANSWER</s>

The tokens around audio come from mistral-common's `encode_transcription` and `encode_instruct`. A context is user text
after the audio, as in Mistral's own example of a transcription with a text prompt (mistral-common's test
`test_tokenize_transcribe_with_lang_and_text_prompt`). Text is encoded without special tokens, so that nothing in a
transcript, a context or an instruction can end a turn or begin another.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path

import numpy as np
import soundfile
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.chunk import AudioChunk, TextChunk
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import InstructRequest
from mistral_common.protocol.transcription.request import TranscriptionRequest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from pydantic import ValidationError
from transformers import MistralCommonBackend, VoxtralConfig

from voxtral_dist.errors import UserError, first_line
from voxtral_dist.model.folders import refuse_wrong_model
from voxtral_dist.model.native import config_of_native, context_limit, native_folder
from voxtral_dist.text.languages import LANGUAGE_CODES, split_language_tag

# A text that shows where user text goes; it is one token in every vocabulary.
_PROBE = "a"


@dataclass(frozen=True)
class Transcript:
    """A model's answer: the text, and the detected language before it, if there is one."""

    text: str
    language: str | None


@dataclass(frozen=True)
class _Frame:
    """The tokens of a prompt before, in and after one window of audio, without the user's text."""

    before: tuple[int, ...]
    window: tuple[int, ...]
    after: tuple[int, ...]

    def around(self, num_windows: int, text_ids: Sequence[int]) -> tuple[int, ...]:
        return (*self.before, *self.window * num_windows, *text_ids, *self.after)


class VoxtralPrompts:
    """The prompts and completions of one Voxtral checkpoint.

    max_positions: maximum tokens of prompt and completion together, by the language model's positions.

    Example:
        >>> from voxtral_dist import VoxtralPrompts
        >>> prompts = VoxtralPrompts.from_pretrained("models/tiny")
        >>> ids = prompts.transcription("en", num_windows=1)
        >>> prompts.pieces(ids)[-2:]
        ["'en'", '[TRANSCRIBE]']
        >>> prompts.decode(prompts.completion("Hello, world."))
        'Hello, world.'
    """

    def __init__(self, tokenizer: MistralTokenizer, max_positions: int) -> None:
        self._instruct = tokenizer.instruct_tokenizer
        self._text = self._instruct.tokenizer
        if self._instruct.audio_encoder is None:
            raise UserError("The tokenizer has no `audio` section: `model.path` must lead to a Voxtral checkpoint.")
        self.max_positions = max_positions
        self._audio_config = self._instruct.audio_encoder.audio_config
        self._plain_transcription = lru_cache(maxsize=512)(self._build_transcription)
        self._transcription_frame = cache(self._build_transcription_frame)

    @classmethod
    def from_pretrained(cls, path: str, max_positions: int | None = None) -> VoxtralPrompts:
        """Read the tokenizer of a Voxtral folder or hub name.

        Args:
            path: folder or hub name.
            max_positions: positions of the language model that may be used; None: those it was trained for.

        Raises:
            UserError: `tekken.json` or `config.json` is missing, or is not of a Voxtral checkpoint.
        """
        _check_folder(path)
        try:
            tokenizer = MistralCommonBackend.from_pretrained(path).tokenizer
        except (OSError, ValueError, KeyError, AssertionError, MistralCommonException) as error:
            raise UserError(
                f"`model.path`: {path!r} has no usable tokenizer ({type(error).__name__}: {first_line(error)})."
            ) from error
        return cls(tokenizer, _max_positions(path) if max_positions is None else max_positions)

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of the model's audio, in Hz."""
        return int(self._audio_config.sampling_rate)

    @property
    def window_samples(self) -> int:
        """Samples in one window of the encoder: 480,000 for 30 s."""
        return int(self._audio_config.chunk_frames)

    @property
    def window_seconds(self) -> float:
        """Duration of one window of the encoder."""
        return self.window_samples / self.sampling_rate

    @property
    def num_mel_bins(self) -> int:
        """Mel bins of the encoder's features."""
        return int(self._audio_config.encoding_config.num_mel_bins)

    @property
    def hop_samples(self) -> int:
        """Samples between two frames of the features."""
        return int(self._audio_config.encoding_config.hop_length)

    @property
    def audio_tokens_per_window(self) -> int:
        """Positions of the language model for one window: 375 for 30 s."""
        return len(self._instruction_frame.window)

    @property
    def pad_id(self) -> int:
        """Token id of padding."""
        return int(self._text.pad_id)

    @property
    def audio_id(self) -> int:
        """Token id of `[AUDIO]`, whose embeddings the encoder's output replaces."""
        return int(self._instruct.audio_encoder.audio_token)

    @property
    def eos_id(self) -> int:
        """The token `</s>` at the end of every completion."""
        return int(self._text.eos_id)

    def num_windows(self, num_samples: int) -> int:
        """The number of windows for this many samples; the last one is padded with silence."""
        return -(-num_samples // self.window_samples)

    def transcription(self, language: str | None, num_windows: int, context: str = "") -> tuple[int, ...]:
        """The ids of a transcription prompt, including `[TRANSCRIBE]`.

        Args:
            language: ISO 639-1 code of the speech; None asks the model to detect it.
            num_windows: windows of audio.
            context: words that the transcript may contain, or text that it follows; see `data.examples.prompting`.

        Raises:
            ValueError: the language is not an ISO 639-1 code that mistral-common knows.
        """
        if not context:
            ids: tuple[int, ...] = self._plain_transcription(language, num_windows)
            return ids
        return self._transcription_frame(language).around(num_windows, self.encode(context))

    def instruction(self, text: str, num_windows: int) -> tuple[int, ...]:
        """The ids of a prompt with a question or another instruction about audio, including `[/INST]`."""
        return self._instruction_frame.around(num_windows, self.encode(text))

    def completion(self, text: str) -> list[int]:
        """The ids of a target text and `</s>`."""
        return [*self.encode(text), self.eos_id]

    def tag(self, language: str) -> tuple[int, ...]:
        """The ids of the language tag `lang:xx`, which a model writes before a transcript where the prompt has none.

        Raises:
            KeyError: the language is not an ISO 639-1 code.
        """
        return self._tags[language]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, in which the names of special tokens are plain text."""
        ids: list[int] = self._text.encode(text, bos=False, eos=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The exact text of ids, without special tokens."""
        text: str = self._text.decode(list(ids), special_token_policy=SpecialTokenPolicy.IGNORE)
        return text

    def transcript(self, ids: Sequence[int]) -> Transcript:
        """The transcript and the detected language in generated ids.

        A language tag is never part of the text, so a transcript that begins with `lang:` and a code would lose them.
        """
        plain = [token for token in ids if not self._text.is_special(token)]
        for language, tag in self._tags.items():
            if tuple(plain[: len(tag)]) == tag:
                return Transcript(self.decode(plain[len(tag) :]).strip(), language)
        # An undertrained model may write the tag in other tokens than Mistral's encoding of it.
        written, text = split_language_tag(self.decode(plain))
        return Transcript(text, written)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Readable pieces, one per id: `[AUDIO]` for a special token, `'text'`, `'\\xf0'` for a part of a character."""
        return [self._piece(token) for token in ids]

    def _piece(self, token: int) -> str:
        contents: bytes = self._text.id_to_byte_piece(token, SpecialTokenPolicy.KEEP)
        if self._text.is_special(token):
            return contents.decode("utf-8")
        try:
            return repr(contents.decode("utf-8"))
        except UnicodeDecodeError:
            return repr(contents).removeprefix("b")

    @cached_property
    def num_prompt_tokens(self) -> int:
        """Maximum tokens of a prompt besides audio and user text, with the longest language tag.

        It also bounds a prompt without a language together with the tag in its completion.
        """
        return len(self.transcription(None, 0)) + max(map(len, self._tags.values()))

    @cached_property
    def _tags(self) -> dict[str, tuple[int, ...]]:
        # As mistral-common writes them before `[TRANSCRIBE]`, and as transformers removes them from answers.
        return {language: tuple(self.encode(f"lang:{language}")) for language in LANGUAGE_CODES}

    def _build_transcription(self, language: str | None, num_windows: int) -> tuple[int, ...]:
        return self._transcription_frame(language).around(num_windows, ())

    def _build_transcription_frame(self, language: str | None) -> _Frame:
        try:
            request = TranscriptionRequest(audio=self._silence, language=language)
        except ValidationError as error:
            raise ValueError(f"has the language {language!r}, which is not an ISO 639-1 code such as 'en'") from error
        return self._frame(self._instruct.encode_transcription(request).tokens, ())

    @cached_property
    def _instruction_frame(self) -> _Frame:
        content = [AudioChunk(input_audio=self._silence), TextChunk(text=_PROBE)]
        request = InstructRequest(messages=[UserMessage(content=content)])
        return self._frame(self._instruct.encode_instruct(request).tokens, self.encode(_PROBE))

    def _frame(self, tokens: Sequence[int], text_ids: Sequence[int]) -> _Frame:
        """Split the prompt of one window at its audio and its text."""
        start = tokens.index(self.audio_id)
        end = start + sum(token == self.audio_id for token in tokens)
        after = end + len(text_ids)
        assert list(tokens[end:after]) == list(text_ids), "mistral-common puts user text after the audio"
        return _Frame(tuple(tokens[:start]), tuple(tokens[start:end]), tuple(tokens[after:]))

    @cached_property
    def _silence(self) -> str:
        """One window of silence, as base64 of a WAV file."""
        wav = io.BytesIO()
        samples = np.zeros(self.window_samples, dtype=np.int16)
        soundfile.write(wav, samples, self.sampling_rate, format="WAV", subtype="PCM_16")
        return base64.b64encode(wav.getvalue()).decode("ascii")


def _max_positions(path: str) -> int:
    native = native_folder(path)
    try:
        config = VoxtralConfig.from_pretrained(path) if native is None else config_of_native(native)
        return context_limit(path, config)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = f"({type(error).__name__}: {first_line(error)})"
        if native is None:
            raise UserError(f"`model.path`: {path!r} has no usable config.json {reason}.") from error
        raise UserError(
            f"`model.path`: {path!r} has no config.json, as folders of Hugging Face do, and no usable params.json of "
            f"Mistral's layout {reason}."
        ) from error


def _check_folder(path: str) -> None:
    """Refuse a path that is neither a hub name nor a Voxtral folder."""
    refuse_wrong_model(path)
    folder = Path(path)
    for name in ("tekken.json", "config.json") if native_folder(path) is None else ("tekken.json",):
        if folder.is_dir() and not (folder / name).is_file():
            raise UserError(f"The model folder {path} has no {name}: `model.path` must lead to a Voxtral checkpoint.")

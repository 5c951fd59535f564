"""What the index stores about one utterance: duration, characters, tokens, language, and its bytes in the tar."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mistral_common
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from voxtral_dist.data.stored.audio import Pcm
from voxtral_dist.data.stored.checks import Cause, UnusableError, is_silent, is_too_much_text
from voxtral_dist.data.stored.shard_set import LARGEST_COUNT, UNKNOWN_LANGUAGE
from voxtral_dist.data.stored.tar_members import TAR_BLOCK_BYTES
from voxtral_dist.output.counting import counted
from voxtral_dist.shards.corpus.utterances import Utterance

# Durations are measured at the sampling rate of the models.
SAMPLING_RATE = 16_000
_LENGTH_TOLERANCE = 0.1
_LENGTH_TOLERANCE_SECONDS = 0.5


@dataclass(frozen=True)
class Measures:
    """What the index stores about an utterance besides its place."""

    duration_ms: int
    num_text_tokens: int
    num_chars: int
    language: str | None
    num_instruction_tokens: int = 0


@dataclass(frozen=True)
class UtteranceSpan:
    """The bytes of an utterance in its tar, and their CRC-32."""

    offset: int
    num_bytes: int
    crc32: int


def measure(utterance: Utterance, pcm: Pcm, max_chars_per_second: float) -> Measures:
    """Measure an utterance with its samples at 16 kHz.

    Raises:
        UnusableError: the audio is silent, too short for its text, or not as long as its corpus says.
    """
    seconds = len(pcm) / SAMPLING_RATE
    if is_silent(pcm):
        raise UnusableError(Cause.SILENT, "is silent: it never reaches -60 dB of full scale")
    claimed = utterance.claimed_seconds
    if claimed is not None and abs(seconds - claimed) > max(_LENGTH_TOLERANCE * claimed, _LENGTH_TOLERANCE_SECONDS):
        raise UnusableError(Cause.WRONG_LENGTH, f"decodes to {seconds:.2f} s, but its corpus says {claimed:.2f} s")
    num_chars = len(utterance.text)
    if utterance.instruction is None and is_too_much_text(num_chars, seconds, max_chars_per_second):
        raise UnusableError(
            Cause.TEXT_TOO_LONG, f"lasts {seconds:.2f} s, too short for a text of {counted(num_chars, 'character')}"
        )
    # Rounded up: audio that is longer than a window by one sample needs another window.
    return Measures(
        duration_ms=-(-1000 * len(pcm) // SAMPLING_RATE),
        num_text_tokens=_count_tokens(utterance.text),
        num_chars=num_chars,
        language=utterance.language,
        num_instruction_tokens=_count_tokens(utterance.instruction or ""),
    )


def index_record(span: UtteranceSpan, measures: Measures, languages: list[str]) -> tuple[int, ...]:
    """One `RECORD`. A new language is appended to `languages`."""
    return (
        span.offset // TAR_BLOCK_BYTES,
        span.num_bytes // TAR_BLOCK_BYTES,
        measures.duration_ms,
        span.crc32,
        min(measures.num_text_tokens, LARGEST_COUNT),
        min(measures.num_chars, LARGEST_COUNT),
        _number_of(measures.language, languages),
        min(measures.num_instruction_tokens, LARGEST_COUNT),
    )


def _number_of(language: str | None, languages: list[str]) -> int:
    if language is None:
        return UNKNOWN_LANGUAGE
    if language not in languages:
        languages.append(language)
    return languages.index(language)


def _count_tokens(text: str) -> int:
    return len(_published_vocabulary().encode(text, bos=False, eos=False))


@cache
def _published_vocabulary() -> Tekkenizer:
    """Voxtral's published vocabulary, from mistral-common, so that counts do not depend on the model trained later."""
    return Tekkenizer.from_file(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json")

"""Recordings of any length as segments that a model has room for, cut where nobody speaks, as far as loudness tells."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.config import MIN_NEW_TOKENS
from voxtral_dist.data.examples.audio_inputs import AudioInput, pcm_of
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.stored.audio import Pcm
from voxtral_dist.data.stored.checks import UnusableError, is_silent, unusable_on_failure
from voxtral_dist.errors import UserError
from voxtral_dist.evaluation.batch_decoder import Hypothesis
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.output.counting import counted
from voxtral_dist.transcription.question import Question
from voxtral_dist.transcription.recordings import RecordingError
from voxtral_dist.transcription.transcripts import Segment

log = logging.getLogger(__name__)

# Loudness is averaged over 0.3 s: shorter than pauses between sentences, longer than those inside of words.
_FRAME_SECONDS = 0.02
_SMOOTHED_FRAMES = 15
# A cut lies in the last half of the longest possible segment: long segments give more context, and fewer cuts.
_EARLIEST_CUT = 0.5


@dataclass(frozen=True)
class OpenSegment:
    """A segment that is not decoded yet; `example` is None where nothing can be heard."""

    start_seconds: float
    end_seconds: float
    example: Example | None

    @property
    def num_windows(self) -> int:
        """Windows to decode; 0 for silence."""
        return 0 if self.example is None else self.example.num_windows

    def close(self, hypothesis: Hypothesis | None) -> Segment:
        """The segment with its text; None is the text of silence."""
        if hypothesis is None:
            return Segment(self.start_seconds, self.end_seconds, "")
        return Segment(self.start_seconds, self.end_seconds, **vars(hypothesis))


class Segmenter:
    """Cuts recordings into segments with the prompt of one question."""

    def __init__(
        self,
        prompts: VoxtralPrompts,
        question: Question,
        max_tokens_per_second: float,
        max_segment_seconds: float | None = None,
    ) -> None:
        """A segmenter for one model and one question.

        Args:
            prompts: of the model.
            question: asked about every recording.
            max_tokens_per_second: of a transcript; the model must have room for as many.
            max_segment_seconds: longer recordings are cut; None cuts only those that the model has no room for.

        Raises:
            UserError: the prompt leaves no room for a single window of audio.
        """
        self._prompts = prompts
        self._question = question
        self._max_tokens_per_second = max_tokens_per_second
        self._max_seconds = min(self._max_seconds_of_model(), max_segment_seconds or float("inf"))

    def __call__(self, recording: AudioInput, array_rate: int | None = None) -> list[OpenSegment]:
        """The segments of a recording.

        Args:
            recording: see `pcm_of`.
            array_rate: sampling rate of an array in Hz; None means that of the model.

        Raises:
            RecordingError: the recording cannot be read, or is too long for an instruction.
        """
        rate = self._prompts.sampling_rate
        name = f"The recording {recording}" if isinstance(recording, str | PathLike) else "The recording"
        try:
            with unusable_on_failure():
                pcm = pcm_of(recording, rate, array_rate, lambda reason: log.warning("%s %s.", name, reason))
        except UnusableError as error:
            raise RecordingError(f"{name} {error}.") from error
        self._refuse_too_long(name, len(pcm) / rate)
        return [
            OpenSegment(part.start / rate, part.stop / rate, self._example(pcm[part]))
            for part in cut_at_pauses(pcm, rate, self._max_seconds)
        ]

    def _refuse_too_long(self, name: str, seconds: float) -> None:
        if self._question.instruction is not None and seconds > self._max_seconds:
            raise RecordingError(
                f"{name} lasts {seconds:.0f} s, but the model has room for {self._max_seconds:.0f} s: cut it, because "
                "an instruction is about a whole recording."
            )

    def _example(self, pcm: Pcm) -> Example | None:
        """A segment as an example without a reference; None where nothing can be heard."""
        if is_silent(pcm) and self._question.instruction is None:
            return None
        num_windows = self._prompts.num_windows(len(pcm))
        return Example(
            utterance_id=0,
            key="",
            pcm=pcm,
            num_windows=num_windows,
            prompt=self._prompt(num_windows),
            completion=(self._prompts.eos_id,),
            reference="",
            duration_seconds=len(pcm) / self._prompts.sampling_rate,
            is_transcription=self._question.instruction is None,
            is_untagged=self._question.language is None,
            context=self._question.context,
        )

    def _prompt(self, num_windows: int) -> tuple[int, ...]:
        question = self._question
        if question.instruction is not None:
            return self._prompts.instruction(question.instruction, num_windows)
        return self._prompts.transcription(question.language, num_windows, question.context)

    def _max_seconds_of_model(self) -> float:
        """The longest audio whose prompt leaves room for as many tokens as its transcript may have.

        Raises:
            UserError: there is no room for a single window.
        """
        prompts, tokens_per_second = self._prompts, self._max_tokens_per_second
        positions_per_window = prompts.audio_tokens_per_window + tokens_per_second * prompts.window_seconds
        other_positions = len(self._prompt(1)) - prompts.audio_tokens_per_window + MIN_NEW_TOKENS
        num_windows = int((prompts.max_positions - other_positions) / positions_per_window)
        if num_windows < 1:
            raise UserError(
                f"The prompt takes {other_positions} of the model's {counted(prompts.max_positions, 'position')}, "
                f"which leaves no room for {prompts.window_seconds:g} s of audio with "
                f"{counted(tokens_per_second, 'token', 'g')} a second: shorten the context or the instruction, or "
                "lower `--max-tokens-per-second`."
            )
        return num_windows * prompts.window_seconds


def cut_at_pauses(pcm: Pcm, sampling_rate: int, max_seconds: float) -> Iterator[slice]:
    """Parts of a recording, none longer than `max_seconds`, each cut at the quietest place of its last half.

    Args:
        pcm: int16 `(num_samples,)`, at least one sample.
        sampling_rate: in Hz.
        max_seconds: of a part.

    Yields:
        Neighbouring slices of samples that cover the recording.
    """
    if len(pcm) <= max_seconds * sampling_rate:
        yield slice(0, len(pcm))
        return
    frame = round(_FRAME_SECONDS * sampling_rate)
    max_frames = max(2, int(max_seconds * sampling_rate) // frame)
    loudness = _loudness(pcm, frame)
    start = 0
    while len(loudness) - start > max_frames:
        earliest = start + max(1, int(_EARLIEST_CUT * max_frames))
        end = earliest + int(loudness[earliest : start + max_frames].argmin())
        yield slice(start * frame, end * frame)
        start = end
    yield slice(start * frame, len(pcm))


def _loudness(pcm: Pcm, frame: int) -> NDArray[np.float64]:
    """The mean power around each frame, `(num_frames,)`; the last frame may be shorter."""
    num_whole = len(pcm) // frame
    frames = pcm[: num_whole * frame].reshape(-1, frame)
    power = np.einsum("ij,ij->i", frames, frames, dtype=np.float64) / frame
    if (rest := pcm[num_whole * frame :]).size:
        power = np.append(power, np.square(rest.astype(np.float64)).sum() / frame)
    smoothed: NDArray[np.float64] = np.convolve(power, np.full(_SMOOTHED_FRAMES, 1 / _SMOOTHED_FRAMES), mode="same")
    return smoothed[: len(power)]

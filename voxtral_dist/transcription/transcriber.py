"""Transcripts of recordings of any length by one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.data.examples.audio_inputs import AudioInput
from voxtral_dist.distributed.world import World, alone
from voxtral_dist.evaluation.batch_decoder import BatchDecoder, load_decoder, load_prompts
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.transcription.question import Question
from voxtral_dist.transcription.recordings import RecordingError
from voxtral_dist.transcription.segmenter import OpenSegment, Segmenter
from voxtral_dist.transcription.transcripts import RecordingTranscript, Segment


class Transcriber:
    """A model that transcribes recordings in batches of segments, reading as it goes.

    Example:
        >>> from voxtral_dist import Transcriber
        >>> transcriber = Transcriber.from_pretrained("models/tiny")
        >>> texts = transcriber.transcribe(["audio/0_000.flac", "audio/0_001.wav"], language="en")
        >>> len(texts)
        2
    """

    def __init__(self, decoder: BatchDecoder, prompts: VoxtralPrompts, settings: EvaluationConfig) -> None:
        self._decoder = decoder
        self._prompts = prompts
        self._settings = settings

    @classmethod
    def from_pretrained(
        cls, path: str, *, device: str | None = None, precision: str = "auto", **settings: Any
    ) -> Transcriber:
        """Load a model for this process alone.

        Args:
            path: a Hugging Face folder or hub name, or a checkpoint of a run (`RUN/checkpoints/step-N`).
            device: such as `cuda:1` or `cpu`; None takes the first GPU, or the CPU where there is none.
            precision: `float32`, `bfloat16`, `float16`, or `auto` for that of the stored weights.
            settings: fields of `EvaluationConfig` that say how batches are decoded, such as `batch_size=4`,
                `num_beams=3` or `max_tokens_per_second=20`.

        Raises:
            UserError: the model cannot be loaded.

        Example:
            >>> from voxtral_dist import Transcriber
            >>> transcriber = Transcriber.from_pretrained("models/tiny", device="cpu", batch_size=4)
        """
        prompts = load_prompts(path)
        return cls.load(path, prompts, EvaluationConfig(**settings), precision, alone(device))

    @classmethod
    def load(
        cls, path: str, prompts: VoxtralPrompts, settings: EvaluationConfig, precision: str, world: World
    ) -> Transcriber:
        """The transcriber of one rank; see `from_pretrained`."""
        return cls(load_decoder(path, prompts, settings, precision, world), prompts, settings)

    def transcribe(
        self,
        recordings: Sequence[AudioInput],
        language: str | None = None,
        *,
        context: str = "",
        sampling_rate: int | None = None,
    ) -> list[str]:
        """The text of each recording.

        Args:
            recordings: paths of audio files, their bytes, arrays `(num_samples,)` of floats in [-1, 1] or int16, or
                cells of an audio column of a `datasets.Dataset`. Long recordings are cut at pauses.
            language: the speech's ISO 639-1 code, locale or English name; None lets the model detect it.
            context: text in the prompt; see `voxtral_dist.context_text`.
            sampling_rate: of arrays, in Hz; None means that of the model, 16,000.

        Raises:
            RecordingError: a recording cannot be read; `transcripts` yields such errors instead.

        Example:
            >>> import numpy as np
            >>> from voxtral_dist import Transcriber
            >>> transcriber = Transcriber.from_pretrained("models/tiny")
            >>> transcriber.transcribe([np.zeros(8_000)], sampling_rate=8_000)  # silence has no text
            ['']
        """
        transcripts = list(self.transcripts(recordings, Question(language, context), sampling_rate=sampling_rate))
        failed = next((one for one in transcripts if isinstance(one, RecordingError)), None)
        if failed is not None:
            raise failed
        return [one.text for one in transcripts if isinstance(one, RecordingTranscript)]

    def transcripts(
        self,
        recordings: Sequence[AudioInput],
        question: Question | None = None,
        *,
        sampling_rate: int | None = None,
        max_segment_seconds: float | None = None,
    ) -> Iterator[RecordingTranscript | RecordingError]:
        """The transcript of each recording in order, with the times and the detected languages of its segments.

        Args:
            recordings: see `transcribe`.
            question: what is asked; None asks for a transcript in a language that the model detects.
            sampling_rate: of arrays, in Hz; None means that of the model.
            max_segment_seconds: longer recordings are cut at pauses; None cuts what the model has no room for.

        Yields:
            A transcript, or what is wrong with the recording.

        Example:
            >>> from voxtral_dist import Question, Transcriber
            >>> transcriber = Transcriber.from_pretrained("models/tiny")
            >>> question = Question(language="en", context="Keywords: Siobhan, Xiaomi")
            >>> for transcript in transcriber.transcripts(["audio/0_000.flac"], question, max_segment_seconds=1.0):
            ...     lengths = [segment.end_seconds - segment.start_seconds for segment in transcript.segments]
            >>> len(lengths) > 1 and max(lengths) <= 1.0
            True
        """
        segmenter = Segmenter(
            self._prompts, question or Question(), self._settings.max_tokens_per_second, max_segment_seconds
        )
        yield from self.decode(recordings, segmenter, sampling_rate)

    def decode(
        self, recordings: Sequence[AudioInput], segmenter: Segmenter, sampling_rate: int | None = None
    ) -> Iterator[RecordingTranscript | RecordingError]:
        """The transcript of each recording by the segments of a segmenter; see `transcripts`."""
        decoded = self._decode_all(_open_segments(recordings, segmenter, sampling_rate))
        for _, parts in groupby(decoded, key=lambda part: part[0]):
            results = [result for _, result in parts]
            failed = next((one for one in results if isinstance(one, RecordingError)), None)
            yield failed or RecordingTranscript(tuple(one for one in results if isinstance(one, Segment)))

    def _decode_all(
        self, segments: Iterator[tuple[int, OpenSegment | RecordingError]]
    ) -> Iterator[tuple[int, Segment | RecordingError]]:
        """Segments with the numbers of their recordings, decoded in batches as large as the settings allow."""
        waiting: list[tuple[int, OpenSegment | RecordingError]] = []
        num_examples = num_windows = 0
        for number, segment in segments:
            windows = segment.num_windows if isinstance(segment, OpenSegment) else 0
            is_full = num_examples == self._settings.batch_size or num_windows + windows > self._settings.max_windows
            # Silence and errors wait only for the segments before them.
            if num_examples == 0 or (windows and is_full):
                yield from self._decode_batch(waiting)
                waiting, num_examples, num_windows = [], 0, 0
            waiting.append((number, segment))
            num_examples, num_windows = num_examples + bool(windows), num_windows + windows
        yield from self._decode_batch(waiting)

    def _decode_batch(
        self, segments: Sequence[tuple[int, OpenSegment | RecordingError]]
    ) -> Iterator[tuple[int, Segment | RecordingError]]:
        examples = [one.example for _, one in segments if isinstance(one, OpenSegment) and one.example is not None]
        hypotheses = iter(self._decoder(examples) if examples else ())
        for number, segment in segments:
            if isinstance(segment, RecordingError):
                yield number, segment
            else:
                yield number, segment.close(None if segment.example is None else next(hypotheses))


def _open_segments(
    recordings: Sequence[AudioInput], segmenter: Segmenter, sampling_rate: int | None
) -> Iterator[tuple[int, OpenSegment | RecordingError]]:
    for number, recording in enumerate(recordings):
        try:
            yield from ((number, segment) for segment in segmenter(recording, sampling_rate))
        except RecordingError as error:
            yield number, error

"""Transcripts of files and folders: clips of any length, cut at pauses where a model has no room for the whole."""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.prompting import context_text
from voxtral_dist.data.stored.audio import AudioError, Pcm, decode_pcm
from voxtral_dist.data.stored.checks import is_silent
from voxtral_dist.data.stored.layout import AUDIO_SUFFIXES
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError
from voxtral_dist.evaluation.loading import load_transcriber, processor_path
from voxtral_dist.evaluation.transcriber import MIN_NEW_TOKENS, Hypothesis, Transcriber
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.text.steps import even_spaces
from voxtral_dist.text.word_list import WordList
from voxtral_dist.transcription.pauses import cut_at_pauses


@dataclass(frozen=True)
class Question:
    """What the model is asked about files.

    language: of the speech; None asks the model to detect it. context: see `data.context`. instruction: asked instead
    of a transcript.
    """

    language: str | None = None
    context: str = ""
    instruction: str | None = None

    @classmethod
    def of(
        cls, language: str | None, words: Path | None, previous_text: str | None, instruction: str | None
    ) -> Question:
        """A question with all words of a file in its context.

        Raises:
            UserError: the file cannot be read, or an instruction comes with what belongs to transcription alone.
        """
        if instruction is not None and (language or words or previous_text):
            raise UserError(
                "`--instruction` asks something else than a transcript: leave out `--language`, `--words` and "
                "`--previous-text`, and say all in the instruction."
            )
        listed = WordList.read(words, "--words").entries if words else ()
        return cls(language, context_text(listed, previous_text or ""), instruction)


@dataclass(frozen=True)
class Segment:
    """A part of a clip and what was made of it; silence has no text."""

    start_seconds: float
    end_seconds: float
    text: str
    detected_language: str | None = None
    num_tokens: int = 0
    hit_limit: bool = False


@dataclass(frozen=True)
class ClipTranscript:
    """All segments of a clip, in order."""

    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """Of the whole clip."""
        return " ".join(segment.text for segment in self.segments if segment.text)

    @property
    def detected_language(self) -> str | None:
        """Of most segments whose language was named; None where none was."""
        named = Counter(segment.detected_language for segment in self.segments if segment.detected_language)
        return named.most_common(1)[0][0] if named else None


class ClipError(UserError):
    """A clip that cannot be transcribed; the others can."""


def find_clips(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Each clip of some files and folders with its name: that of the file, or its path inside of the folder.

    Raises:
        UserError: a path leads nowhere, or to a folder without audio.
    """
    found: list[tuple[Path, Path]] = []
    for path in paths:
        try:
            is_folder = stat.S_ISDIR(path.stat().st_mode)
        except OSError as error:
            raise UserError(f"The clip {path} cannot be read: {error.strerror}.") from error
        if not is_folder:
            found.append((path, Path(path.name)))
            continue
        inside = sorted(one for one in path.rglob("*") if is_audio(one))
        if not inside:
            known = ", ".join(sorted(AUDIO_SUFFIXES))
            raise UserError(f"The folder {path} holds no audio: none of its files ends with one of {known}.")
        found += [(one, one.relative_to(path)) for one in inside]
    return found


def is_audio(path: Path) -> bool:
    """Whether a file is a clip by the end of its name."""
    return path.suffix.lstrip(".").lower() in AUDIO_SUFFIXES and not path.is_dir()


class ClipTranscriber:
    """Transcribes clips in batches of segments, reading as it goes."""

    def __init__(
        self,
        model_path: str,
        question: Question,
        settings: EvaluationConfig,
        precision: str,
        world: World,
        max_segment_seconds: float | None = None,
    ) -> None:
        """Load a model.

        Args:
            model_path: a folder, a name on the hub, or a checkpoint of a run.
            question: what is asked about every clip.
            settings: how batches are decoded.
            precision: as in `ModelConfig`, or `auto`.
            world: this process among others.
            max_segment_seconds: longer clips are cut at pauses; None cuts only what the model has no room for.

        Raises:
            UserError: the model cannot be loaded, or the question is none that it takes.
        """
        self._question = question
        self._settings = settings
        self._prompts = VoxtralPrompts.from_pretrained(processor_path(model_path))
        self._max_seconds = min(self._most_seconds(), max_segment_seconds or float("inf"))
        self._transcriber: Transcriber = load_transcriber(model_path, self._prompts, settings, precision, world)

    def __call__(self, clips: Sequence[Path]) -> Iterator[tuple[Path, ClipTranscript | ClipError]]:
        """Each clip in order, with its transcript or with what is wrong with it."""
        for number, parts in groupby(self._decoded(clips), key=lambda part: part[0]):
            results = [result for _, result in parts]
            failed = next((one for one in results if isinstance(one, ClipError)), None)
            segments = tuple(one for one in results if isinstance(one, Segment))
            yield clips[number], failed or ClipTranscript(segments)

    def _decoded(self, clips: Sequence[Path]) -> Iterator[tuple[int, Segment | ClipError]]:
        """Segments with the numbers of their clips, in order, decoded as many at a time as a batch holds."""
        waiting: list[tuple[int, _Part | ClipError]] = []
        num_examples = num_windows = 0
        for number, part in self._parts(clips):
            windows = part.num_windows if isinstance(part, _Part) else 0
            is_full = num_examples == self._settings.batch_size or num_windows + windows > self._settings.max_windows
            # What need not be decoded waits only for what is before it.
            if num_examples == 0 or (windows and is_full):
                yield from self._decode(waiting)
                waiting, num_examples, num_windows = [], 0, 0
            waiting.append((number, part))
            num_examples, num_windows = num_examples + bool(windows), num_windows + windows
        yield from self._decode(waiting)

    def _decode(self, parts: Sequence[tuple[int, _Part | ClipError]]) -> Iterator[tuple[int, Segment | ClipError]]:
        examples = [part.example for _, part in parts if isinstance(part, _Part) and part.example is not None]
        hypotheses = iter(self._transcriber(examples) if examples else ())
        for number, part in parts:
            if isinstance(part, ClipError):
                yield number, part
            else:
                yield number, part.segment(next(hypotheses) if part.example is not None else None)

    def _parts(self, clips: Sequence[Path]) -> Iterator[tuple[int, _Part | ClipError]]:
        for number, clip in enumerate(clips):
            try:
                yield from ((number, part) for part in self._parts_of(clip))
            except ClipError as error:
                yield number, error

    def _parts_of(self, clip: Path) -> list[_Part]:
        try:
            pcm = decode_pcm(clip.read_bytes(), self._prompts.sampling_rate)
        except OSError as error:
            raise ClipError(f"The clip {clip} cannot be read: {error.strerror}.") from error
        except AudioError as error:
            raise ClipError(f"The clip {clip} {error}.") from error
        rate = self._prompts.sampling_rate
        seconds = len(pcm) / rate
        if seconds > self._max_seconds and self._question.instruction is not None:
            raise ClipError(
                f"The clip {clip} lasts {seconds:.0f} s, and the model has room for {self._max_seconds:.0f} s: cut it, "
                "because an instruction is about a whole clip."
            )
        return [
            _Part(run.start / rate, run.stop / rate, self._example(clip, pcm[run]))
            for run in cut_at_pauses(pcm, rate, self._max_seconds)
        ]

    def _example(self, clip: Path, pcm: Pcm) -> Example | None:
        """A part of a clip as an example without a reference; None where nothing can be heard."""
        if is_silent(pcm) and self._question.instruction is None:
            return None
        num_windows = self._prompts.num_windows(len(pcm))
        return Example(
            utterance_id=0,
            key=clip.stem,
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
        try:
            return self._prompts.transcription(question.language, num_windows, question.context)
        except ValueError as error:
            raise UserError(f"`--language` {error}.") from error

    def _most_seconds(self) -> float:
        """The longest clip whose prompt leaves room for as many tokens as its transcript may have.

        Raises:
            UserError: there is no room for a single window.
        """
        prompts, tokens_per_second = self._prompts, self._settings.max_tokens_per_second
        of_a_window = prompts.audio_tokens_per_window + tokens_per_second * prompts.window_seconds
        besides = len(self._prompt(1)) - prompts.audio_tokens_per_window + MIN_NEW_TOKENS
        num_windows = int((prompts.max_positions - besides) / of_a_window)
        if num_windows < 1:
            raise UserError(
                f"What is told and asked takes {besides} of the {prompts.max_positions} positions of the model, which "
                f"leaves no room for {prompts.window_seconds:g} s of audio with {tokens_per_second:g} tokens a second: "
                "tell fewer words, or lower `--max-tokens-per-second`."
            )
        return num_windows * prompts.window_seconds


@dataclass(frozen=True)
class _Part:
    """A part of a clip before it is decoded; without an example it is silent."""

    start_seconds: float
    end_seconds: float
    example: Example | None

    @property
    def num_windows(self) -> int:
        """That are decoded."""
        return 0 if self.example is None else self.example.num_windows

    def segment(self, hypothesis: Hypothesis | None) -> Segment:
        if hypothesis is None:
            return Segment(self.start_seconds, self.end_seconds, "")
        return Segment(self.start_seconds, self.end_seconds, **vars(hypothesis))


def to_srt(transcript: ClipTranscript) -> str:
    """SubRip subtitles: a numbered cue for each segment with text. A blank line would end one, so texts have none."""
    spoken = [segment for segment in transcript.segments if segment.text]
    return "".join(f"{number}\n{_cue(segment)}\n\n" for number, segment in enumerate(spoken, 1))


def _cue(segment: Segment) -> str:
    times = f"{_timestamp(segment.start_seconds)} --> {_timestamp(segment.end_seconds)}"
    return f"{times}\n{even_spaces(segment.text)}"


def _timestamp(seconds: float) -> str:
    minutes, milliseconds = divmod(round(1000 * seconds), 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds // 1000:02d},{milliseconds % 1000:03d}"

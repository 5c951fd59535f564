"""Transcripts of audio files and folders by any number of ranks, printed and written to files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.distributed.collectives import PatientSum
from voxtral_dist.distributed.world import World, joined_world
from voxtral_dist.errors import UserError
from voxtral_dist.evaluation.batch_decoder import load_prompts
from voxtral_dist.files import encodable
from voxtral_dist.output.console import one_line, say
from voxtral_dist.output.counting import counted
from voxtral_dist.progress import progress_of_command
from voxtral_dist.transcription.question import Question
from voxtral_dist.transcription.recordings import Recording, RecordingError, find_recordings
from voxtral_dist.transcription.segmenter import Segmenter
from voxtral_dist.transcription.transcriber import Transcriber
from voxtral_dist.transcription.transcript_files import TranscriptFiles, json_row
from voxtral_dist.transcription.transcripts import SUBTITLE_SECONDS, RecordingTranscript, TranscriptFormat


@dataclass(frozen=True)
class TranscribeOptions:
    """Options of transcribing recordings and of writing the transcripts.

    Attributes:
        question: asked about each recording.
        settings: how batches are decoded.
        precision: as in `ModelConfig`, or `auto` for that of the stored weights.
        out_dir: folder for a file in each of `formats` per recording; None writes no files.
        max_segment_seconds: longer recordings are cut at pauses; None means `SUBTITLE_SECONDS` for subtitles, and
            otherwise what the model has room for.
        prints_json: print a line of JSON per recording instead of its path and text.

    Raises:
        UserError: options exclude each other.
    """

    question: Question = field(default_factory=Question)
    settings: EvaluationConfig = field(default_factory=EvaluationConfig)
    precision: str = "auto"
    out_dir: Path | None = None
    formats: tuple[TranscriptFormat, ...] = ("txt",)
    max_segment_seconds: float | None = None
    prints_json: bool = False

    def __post_init__(self) -> None:
        if "srt" in self.formats and self.out_dir is None:
            raise UserError("`--format srt` writes files: name their folder by `--out`.")
        if self.question.instruction is not None and ("srt" in self.formats or self.max_segment_seconds is not None):
            raise UserError(
                "`--instruction` is about whole recordings, but `--format srt` and `--max-segment-seconds` cut them: "
                "remove either."
            )

    @property
    def longest_segment_seconds(self) -> float | None:
        """The longest segment; None where only the model limits it."""
        return self.max_segment_seconds or (SUBTITLE_SECONDS if "srt" in self.formats else None)


def transcribe(model_path: str, paths: Sequence[Path], options: TranscribeOptions) -> None:
    """Transcribe recordings on all ranks of the launcher, each of which takes every n-th.

    Args:
        model_path: a folder, a name on the hub, or a checkpoint of a run.
        paths: audio files, and folders of them.
        options: what is asked, and what is written.

    Raises:
        UserError: an option cannot be met, or a recording could not be transcribed, while all others were.
    """
    recordings = find_recordings(paths)
    files = None if options.out_dir is None else TranscriptFiles(options.out_dir, options.formats, recordings)
    with joined_world() as world:
        sum_at_end = PatientSum(world)
        failures = _transcribe_every_nth(model_path, recordings, options, files, world)
        # A rank that ended before the others would make the launcher end them.
        num_failed = sum_at_end(len(failures))
    if failures and len(recordings) == 1:
        raise failures[0]
    if num_failed:
        raise UserError(
            f"{num_failed} of {counted(len(recordings), 'recording')} could not be transcribed; the messages above "
            "say why."
        )


def _transcribe_every_nth(
    model_path: str,
    recordings: Sequence[Recording],
    options: TranscribeOptions,
    files: TranscriptFiles | None,
    world: World,
) -> list[UserError]:
    """Transcribe this rank's recordings; the errors of those that failed, which are printed where there are others."""
    prompts = load_prompts(model_path)
    settings = options.settings
    segmenter = Segmenter(prompts, options.question, settings.max_tokens_per_second, options.longest_segment_seconds)
    transcriber = Transcriber.load(model_path, prompts, settings, options.precision, world)
    own = recordings[world.rank :: world.size]
    failures: list[UserError] = []
    decoded = zip(own, transcriber.decode([one.path for one in own], segmenter), strict=True)
    display = progress_of_command("transcribe", len(own), prints_lines=False)
    # The first rank's recordings stand for those of the others.
    with display if world.is_first else nullcontext():
        for number, (recording, transcript) in enumerate(decoded, 1):
            try:
                _deliver(recording, transcript, files, options.prints_json)
            except UserError as error:
                failures.append(error)
                if len(recordings) > 1:
                    say(f"voxtral-dist: {one_line(str(error))}", to_errors=True)
            display.show(number)
    return failures


def _deliver(
    recording: Recording,
    transcript: RecordingTranscript | RecordingError,
    files: TranscriptFiles | None,
    prints_json: bool,
) -> None:
    """Print a transcript and write its files.

    Raises:
        UserError: the recording has no transcript, or a file cannot be written.
    """
    if isinstance(transcript, RecordingError):
        raise transcript
    path = recording.path
    say(json_row(path, transcript) if prints_json else f"{one_line(encodable(str(path)))}\t{one_line(transcript.text)}")
    if files is not None:
        files.write(recording, transcript)

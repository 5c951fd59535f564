"""The grammar of `voxtral-dist transcribe`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from voxtral_dist.cli.arguments import Commands, add_decoding, decoding_settings
from voxtral_dist.config import EvaluationConfig
from voxtral_dist.errors import UserError
from voxtral_dist.files import failures_named, readable, refuse_unwritable, write_whole

if TYPE_CHECKING:
    from voxtral_dist.transcription.recordings import ClipError, ClipTranscript

_FORMATS = ("txt", "json", "srt")
# A subtitle stands for as long as its segment lasts, and nobody reads a minute of speech at once.
_SUBTITLE_SECONDS = 10.0


def add_transcribe(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("transcribe", help="transcripts of audio files and folders, of any length")
    add_decoding(parser)
    parser.add_argument("clips", type=Path, nargs="+", help="audio files, and folders of them")
    parser.add_argument("--language", help="ISO 639-1 code; without it the model is asked to detect the language")
    parser.add_argument("--words", type=Path, metavar="FILE", help="words that are likely, one in each line")
    parser.add_argument("--previous-text", metavar="TEXT", help="what was said before")
    parser.add_argument("--instruction", metavar="TEXT", help="ask this about the audio instead of a transcript")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a file for each clip there, by its name")
    parser.add_argument("--format", choices=_FORMATS, nargs="+", default=["txt"], help="of these files (default: txt)")
    parser.add_argument(
        "--max-segment-seconds",
        type=_seconds,
        metavar="SECONDS",
        help=f"cut longer clips at pauses (default: {_SUBTITLE_SECONDS:g} for srt, else what the model has room for)",
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each file")
    parser.set_defaults(run=_transcribe)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 1.0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError("must be at least 1 second")
    return seconds


def _transcribe(parsed: argparse.Namespace) -> int:
    from voxtral_dist.distributed.collectives import PatientSum
    from voxtral_dist.distributed.world import joined_world
    from voxtral_dist.transcription.recordings import ClipTranscriber, Question, find_clips

    if "srt" in parsed.format and parsed.out is None:
        raise UserError("`--format srt` makes files: name their folder by `--out`.")
    if parsed.instruction is not None and ("srt" in parsed.format or parsed.max_segment_seconds is not None):
        raise UserError(
            "`--instruction` asks about whole clips: leave out `--format srt` and `--max-segment-seconds`, which cut."
        )
    clips = find_clips(parsed.clips)
    if parsed.out is not None:
        refuse_unwritable("--out", parsed.out)
    paths = _out_paths(clips, parsed.out, parsed.format) if parsed.out else [None] * len(clips)
    question = Question.of(parsed.language, parsed.words, parsed.previous_text, parsed.instruction)
    settings = EvaluationConfig(**decoding_settings(parsed))
    by_default = _SUBTITLE_SECONDS if "srt" in parsed.format else None
    failures: list[UserError] = []
    with joined_world() as world:
        sum_at_end = PatientSum(world)
        transcriber = ClipTranscriber(
            parsed.model, question, settings, parsed.precision, world, parsed.max_segment_seconds or by_default
        )
        mine = slice(world.rank, None, world.size)
        found = transcriber([clip for clip, _ in clips[mine]])
        for (clip, transcript), path in zip(found, paths[mine], strict=True):
            try:
                _hand_over(clip, transcript, path, parsed)
            except UserError as error:
                failures.append(error)
                if len(clips) > 1:
                    print(f"voxtral-dist: {error}", file=sys.stderr, flush=True)
        # A rank that ended before the others would take them with it.
        num_failed = sum_at_end(len(failures))
    if failures and len(clips) == 1:
        raise failures[0]
    if num_failed:
        raise UserError(f"{num_failed} of {len(clips)} clips could not be transcribed; above it says why.")
    return 0


def _hand_over(
    clip: Path, transcript: ClipTranscript | ClipError, path: Path | None, parsed: argparse.Namespace
) -> None:
    """Print a transcript, and write it where it is wanted.

    Raises:
        UserError: there is none, or it cannot be written.
    """
    if isinstance(transcript, UserError):
        raise transcript
    _print(clip, transcript, as_json=parsed.json)
    if path is not None:
        with failures_named("--out", path):
            _write(path, clip, transcript, parsed.format)


def _out_paths(clips: list[tuple[Path, Path]], folder: Path, formats: list[str]) -> list[Path]:
    """Where the results of clips go, without the suffix of a format.

    Raises:
        UserError: two clips have the same name, or one is too long, or a file beside a clip would be replaced: such
            texts are often what a human wrote, and `shards pack` takes them for that.
    """
    paths = [folder / name.with_suffix("") for _, name in clips]
    twice = next((path for path, count in Counter(paths).items() if count > 1), None)
    if twice is not None:
        raise UserError(
            f"`--out`: the results of two clips would be {twice}: transcribe clips of the same name into folders of "
            "their own."
        )
    longest_name = os.pathconf(folder, "PC_NAME_MAX")
    stems = {folder: _stems_of_clips(folder) for folder in {path.parent for path in paths}}
    for (clip, _), path in zip(clips, paths, strict=True):
        for one in formats:
            beside = _of_format(path, one)
            if len(os.fsencode(beside.name)) > longest_name:
                raise UserError(
                    f"`--out`: the name {beside.name} is longer than {longest_name} bytes: rename the clip."
                )
            if beside.exists() and (beside.parent.samefile(clip.parent) or path.name in stems[path.parent]):
                raise UserError(
                    f"`--out`: {beside} lies beside a clip and would be replaced: choose another folder, or move the "
                    "file away if it is an old result."
                )
    return paths


def _stems_of_clips(folder: Path) -> set[str]:
    """The names of the clips in a folder, which need not be there, without their suffixes."""
    from voxtral_dist.transcription.recordings import is_audio

    return {path.stem for path in folder.iterdir() if is_audio(path)} if folder.is_dir() else set()


def _row(clip: Path, transcript: ClipTranscript) -> str:
    row = {"clip": readable(str(clip)), "text": transcript.text, "detected_language": transcript.detected_language}
    return json.dumps(row | asdict(transcript), ensure_ascii=False)


def _print(clip: Path, transcript: ClipTranscript, *, as_json: bool) -> None:
    print(_row(clip, transcript) if as_json else f"{readable(str(clip))}\t{transcript.text}", flush=True)


def _write(path: Path, clip: Path, transcript: ClipTranscript, formats: list[str]) -> None:
    from voxtral_dist.transcription.recordings import to_srt

    contents = {"txt": f"{transcript.text}\n", "json": f"{_row(clip, transcript)}\n", "srt": to_srt(transcript)}
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in formats:
        write_whole(_of_format(path, name), contents[name])


def _of_format(path: Path, name: str) -> Path:
    return path.with_name(f"{path.name}.{name}")

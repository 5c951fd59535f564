"""`voxtral-dist transcribe`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from voxtral_dist.cli.arguments import Commands, add_decoding, decoding_settings, examples, number
from voxtral_dist.config import EvaluationConfig
from voxtral_dist.distributed.launchers import is_on_several_hosts
from voxtral_dist.model.folders import refuse_unknown_name, refuse_wrong_model
from voxtral_dist.transcription.recordings import refuse_missing_recording
from voxtral_dist.transcription.transcripts import SUBTITLE_SECONDS, TranscriptFormat


def add_transcribe(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "transcribe",
        help="transcribe audio files and folders of any length",
        epilog=examples(
            "voxtral-dist transcribe runs/first/export interview.mp3 --language French",
            "voxtral-dist transcribe mistralai/Voxtral-Mini-3B-2507 recordings --out texts --format txt srt",
        ),
    )
    add_decoding(parser)
    parser.add_argument("recordings", type=Path, nargs="+", help="audio files, and folders of them")
    parser.add_argument(
        "--language",
        help="de, de-DE or German; without it, the model detects the language",
    )
    parser.add_argument("--words", type=Path, metavar="FILE", help="likely words, one per line, for the context")
    parser.add_argument("--previous-text", metavar="TEXT", help="what was said before the recording, for the context")
    parser.add_argument("--instruction", metavar="TEXT", help="ask this about the audio, instead of transcribing it")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for transcripts, NAME.txt for NAME.wav")
    parser.add_argument(
        "--format",
        choices=get_args(TranscriptFormat),
        nargs="+",
        default=["txt"],
        help="formats of the files in --out (default: txt)",
    )
    parser.add_argument(
        "--max-segment-seconds",
        type=_seconds,
        metavar="SECONDS",
        help=f"split longer recordings at pauses (default: {SUBTITLE_SECONDS:g} for srt, else the model's maximum)",
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON per recording")
    parser.set_defaults(run=_transcribe)


def _seconds(text: str) -> float:
    seconds = number(float, text)
    if seconds is None or not 1.0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 1 second, but is {text!r} instead")
    return seconds


def _transcribe(parsed: argparse.Namespace) -> int:
    if not is_on_several_hosts():
        refuse_wrong_model(parsed.model, "MODEL", takes_checkpoints=True)
        for path in parsed.recordings:
            refuse_missing_recording(path)
        refuse_unknown_name(parsed.model, "MODEL")
    # Imports torch.
    from voxtral_dist.transcribe import TranscribeOptions, transcribe
    from voxtral_dist.transcription.question import Question

    options = TranscribeOptions(
        question=Question.of(parsed.language, parsed.words, parsed.previous_text, parsed.instruction),
        settings=EvaluationConfig(**decoding_settings(parsed)),
        precision=parsed.precision,
        out_dir=parsed.out,
        formats=tuple(parsed.format),
        max_segment_seconds=parsed.max_segment_seconds,
        prints_json=parsed.json,
    )
    transcribe(parsed.model, parsed.recordings, options)
    return 0

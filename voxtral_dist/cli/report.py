"""`voxtral-dist report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from voxtral_dist.cli.arguments import Commands, count, examples, positive, positive_number, text_step
from voxtral_dist.output.console import say

if TYPE_CHECKING:
    from voxtral_dist.reporting.results_folder import Step


def add_report(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "report",
        help="write report.html and report.md about a run or saved results",
        epilog=examples("voxtral-dist report runs/first --baseline runs/zero --step best"),
    )
    parser.add_argument(
        "folder", type=Path, help="folder of a run, or folder written by `evaluate --out` or `score --out`"
    )
    parser.add_argument(
        "--step",
        type=_step,
        default="newest",
        metavar="N",
        help="step of the run: a number, `newest` (default), or `best`: that of the selected checkpoint, or without "
        "selection the one with the lowest WER on the first test set",
    )
    parser.add_argument("--baseline", type=Path, metavar="FOLDER", help="run or folder of results to compare with")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for the report (default: the folder itself)")
    parser.add_argument(
        "--shards",
        type=_named_folder,
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="shards with the audio of test set NAME (default: from config.yaml of the run)",
    )
    parser.add_argument(
        "--num-utterances",
        type=positive,
        default=20,
        metavar="N",
        help="utterances in each list (default: %(default)s)",
    )
    parser.add_argument(
        "--num-clips",
        type=count,
        default=20,
        metavar="N",
        help="utterances with an audio player per test set; 0: none (default: %(default)s)",
    )
    parser.add_argument(
        "--max-audio-megabytes",
        type=positive_number,
        default=20.0,
        metavar="MB",
        help="maximum audio of all test sets together; base64 makes it a third larger (default: %(default)g)",
    )
    parser.add_argument(
        "--speaker-field", metavar="FIELD", help="field that names the speaker (default: the one used in scoring)"
    )
    parser.add_argument(
        "--normalizer",
        metavar="module:function",
        help="your own normalizer, if results were made with it; a function named only in the results is never run",
    )
    parser.add_argument(
        "--target-text",
        type=text_step,
        nargs="+",
        default=[],
        metavar="module:function",
        help="your own text steps, if results were made with them; likewise",
    )
    parser.set_defaults(run=_report)


def _step(text: str) -> Step:
    match text:
        case "newest" | "best":
            return text
        case _ if text.isdecimal():
            return int(text)
    raise argparse.ArgumentTypeError(f"must be a number of steps, newest or best, but is {text!r} instead")


def _named_folder(text: str) -> tuple[str, str]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER, but is {text!r} instead")
    return name, folder


def _report(parsed: argparse.Namespace) -> int:
    from voxtral_dist.reporting.results_folder import ReportOptions
    from voxtral_dist.reporting.writing import write_report

    options = ReportOptions(
        step=parsed.step,
        baseline=parsed.baseline,
        shards=dict(parsed.shards),
        num_utterances=parsed.num_utterances,
        num_clips=parsed.num_clips,
        max_audio_megabytes=parsed.max_audio_megabytes,
        speaker_field=parsed.speaker_field,
        normalizer=parsed.normalizer,
        target_text=tuple(parsed.target_text),
    )
    for path in write_report(parsed.folder, options, parsed.out):
        say(path)
    return 0

"""`voxtral-dist score`."""

from __future__ import annotations

import argparse
from pathlib import Path

from voxtral_dist.cli.arguments import Commands, add_scoring
from voxtral_dist.output.console import say


def add_score(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("score", help="measure error rates of saved hypotheses, and compare two runs")
    parser.add_argument(
        "first",
        type=Path,
        metavar="A.jsonl",
        help="hypotheses from an evaluation, or any JSON lines with `reference` and `hypothesis`",
    )
    parser.add_argument(
        "second",
        type=Path,
        nargs="?",
        metavar="B.jsonl",
        help="hypotheses of another run on the same utterances, compared with A",
    )
    add_scoring(parser)
    parser.add_argument("--words", type=Path, metavar="FILE", help="listed words, one per line: report B-WER and U-WER")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder for results: NAME.json and NAME.jsonl (default: print only)"
    )
    parser.set_defaults(run=_score)


def _score(parsed: argparse.Namespace) -> int:
    from voxtral_dist.score import (
        ScoreOptions,
        compare_files,
        refuse_unknown_speakers,
        score_file,
        write_comparison,
        write_scored,
    )
    from voxtral_dist.scoring.grouping import Grouping
    from voxtral_dist.scoring.tables import comparison_line, result_lines

    grouping = Grouping(tuple(parsed.slices), parsed.speaker_field)
    options = ScoreOptions(parsed.normalizer, tuple(parsed.target_text), grouping, parsed.words)
    first = score_file(parsed.first, options)
    if parsed.second is None:
        refuse_unknown_speakers([first], grouping)
        if parsed.out is not None:
            write_scored(parsed.out, first)
        say("\n".join(result_lines(first.result)))
        return 0
    second = score_file(parsed.second, options)
    refuse_unknown_speakers([first, second], grouping)
    comparison = compare_files(first, second, grouping)
    if parsed.out is not None:
        write_comparison(parsed.out, first, second, comparison)
    for scored in (first, second):
        say("\n".join([str(scored.path), *result_lines(scored.result), ""]))
    say(comparison_line(comparison))
    return 0

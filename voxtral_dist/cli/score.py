"""`voxtral-dist score`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from voxtral_dist.cli.arguments import Commands, add_scoring, examples
from voxtral_dist.config import ErrorRate
from voxtral_dist.errors import UserError
from voxtral_dist.output.console import say


def add_score(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "score",
        help="measure error rates of saved hypotheses, and compare two runs",
        epilog=examples(
            "voxtral-dist score evaluation/before/dev.jsonl evaluation/after/dev.jsonl",
            "voxtral-dist score hypotheses.txt --references references.txt --language de",
        ),
    )
    parser.add_argument(
        "first",
        type=Path,
        metavar="A",
        help="hypotheses: NAME.jsonl of an evaluation, JSON lines or a table (.csv, .tsv) with `reference` and "
        "`hypothesis` or NeMo's `text` and `pred_text`, or with --references a text file",
    )
    parser.add_argument(
        "second",
        type=Path,
        nargs="?",
        metavar="B",
        help="hypotheses of another run on the same utterances, compared with A",
    )
    parser.add_argument(
        "--references",
        type=Path,
        metavar="FILE",
        help="text file of the references of A and B, which are text files too: line by line, Kaldi's `text`, or trn",
    )
    parser.add_argument("--reference-field", metavar="NAME", help="key or column with the reference")
    parser.add_argument("--hypothesis-field", metavar="NAME", help="key or column with the hypothesis")
    parser.add_argument("--key-field", metavar="NAME", help="key or column with the name of the utterance")
    parser.add_argument("--language", help="language of utterances without one: a code, a locale or an English name")
    parser.add_argument(
        "--metric",
        choices=get_args(ErrorRate),
        default="wer",
        help="error rate by which A and B are compared (default: %(default)s)",
    )
    add_scoring(parser)
    parser.add_argument("--words", type=Path, metavar="FILE", help="listed words, one per line: report B-WER and U-WER")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder for results: NAME.json and NAME.jsonl (default: print only)"
    )
    parser.set_defaults(run=_score)


def _language(text: str | None) -> str | None:
    from voxtral_dist.text.languages import language_code

    try:
        return language_code(text)
    except ValueError as error:
        raise UserError(f"`--language` {error}.") from error


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
    from voxtral_dist.scoring.transcript_pairs import RowKeys

    grouping = Grouping(tuple(parsed.slices), parsed.speaker_field)
    keys = RowKeys(
        parsed.reference_field, parsed.hypothesis_field, parsed.key_field, _language(parsed.language), parsed.references
    )
    options = ScoreOptions(parsed.normalizer, tuple(parsed.target_text), grouping, parsed.words, keys, parsed.metric)
    first = score_file(parsed.first, options)
    if parsed.second is None:
        refuse_unknown_speakers([first], grouping)
        if parsed.out is not None:
            write_scored(parsed.out, first)
        say("\n".join(result_lines(first.result)))
        return 0
    second = score_file(parsed.second, options)
    refuse_unknown_speakers([first, second], grouping)
    comparison = compare_files(first, second, grouping, options.metric)
    if parsed.out is not None:
        write_comparison(parsed.out, first, second, comparison)
    for scored in (first, second):
        say("\n".join([str(scored.path), *result_lines(scored.result), ""]))
    say(comparison_line(comparison))
    return 0

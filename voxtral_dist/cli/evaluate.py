"""`voxtral-dist evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from voxtral_dist.cli.arguments import Commands, add_decoding, add_scoring, count, decoding_settings
from voxtral_dist.config import EvaluationConfig, TestContextConfig
from voxtral_dist.errors import UserError

if TYPE_CHECKING:
    from voxtral_dist.evaluate import EvaluationOptions


def add_evaluate(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("evaluate", help="measure the word error rate of a model on shard folders")
    add_decoding(parser)
    parser.add_argument("shards", nargs="+", help="folders of shards with an index")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("evaluation"),
        help="folder for results: NAME.json and NAME.jsonl per test set (default: %(default)s)",
    )
    parser.add_argument("--no-loss", action="store_true", help="do not measure the loss of the references")
    add_scoring(parser)
    parser.add_argument(
        "--detect-language",
        action="store_true",
        help="omit the language from the prompt; report detection accuracy",
    )
    parser.add_argument(
        "--words",
        type=Path,
        metavar="FILE",
        help="listed words, one per line: also decode with contexts, and report B-WER and U-WER",
    )
    parser.add_argument(
        "--distractors",
        type=count,
        nargs="+",
        metavar="N",
        help="numbers of distractors (listed words that are not in the reference) in a context; the test set is "
        "decoded once for each number (default: 0 100)",
    )
    parser.set_defaults(run=_evaluate)


def _evaluate(parsed: argparse.Namespace) -> int:
    from voxtral_dist.distributed.world import joined_world
    from voxtral_dist.evaluate import evaluate

    options = _options(parsed)
    with joined_world() as world:
        for name, score in evaluate(parsed.model, parsed.shards, options, parsed.precision, parsed.out, world):
            if world.is_first:
                print(f"{name}: {score}")
    return 0


def _options(parsed: argparse.Namespace) -> EvaluationOptions:
    from voxtral_dist.evaluate import EvaluationOptions

    settings = EvaluationConfig(
        **decoding_settings(parsed),
        measures_loss=not parsed.no_loss,
        normalizer=parsed.normalizer,
        slices=tuple(parsed.slices),
        speaker_field=parsed.speaker_field,
    )
    return EvaluationOptions(
        settings=settings,
        detect_language=parsed.detect_language,
        context=_context(parsed),
        target_text=tuple(parsed.target_text),
    )


def _context(parsed: argparse.Namespace) -> TestContextConfig | None:
    if parsed.distractors and parsed.words is None:
        raise UserError("`--distractors` needs a word list: name its file by `--words`.")
    if parsed.words is None:
        return None
    sizes = {"num_distractors": tuple(parsed.distractors)} if parsed.distractors else {}
    return TestContextConfig(words=parsed.words, **sizes)

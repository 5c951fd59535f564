"""How hypotheses are scored, as options of a command."""

from __future__ import annotations

import argparse
from typing import get_args

from voxtral_dist.config import NORMALIZERS, EvaluationConfig, TextStep, check_normalizer


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how hypotheses are scored."""
    defaults = EvaluationConfig()
    parser.add_argument(
        "--normalizer",
        type=normalizer_name,
        default=defaults.normalizer,
        metavar="NAME",
        help=f"{', '.join(NORMALIZERS)}, or a function of yours as module:function (default: %(default)s)",
    )
    parser.add_argument("--target-text", choices=get_args(TextStep), nargs="+", default=[], help="as in training")
    parser.add_argument("--slices", nargs="+", default=[], metavar="FIELD", help="rates of each value of these fields")
    parser.add_argument(
        "--speaker-field",
        default=defaults.speaker_field,
        metavar="FIELD",
        help="whose errors go together (default: %(default)s)",
    )


def normalizer_name(text: str) -> str:
    """The name of a normalizer, for argparse."""
    try:
        return check_normalizer(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error

"""Argument types and options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

from voxtral_dist.config import (
    NORMALIZERS,
    TEXT_STEPS,
    EvaluationConfig,
    ModelConfig,
    check_normalizer,
    check_text_step,
    is_hub_name,
)

Commands = argparse._SubParsersAction  # the type has no public name

_Number = TypeVar("_Number", int, float)

_PRECISIONS = ("auto", *get_args(ModelConfig.model_fields["precision"].annotation))


def examples(*commands: str) -> str:
    """The end of a command's `--help`: a command for each line, which a test parses."""
    return "\n  ".join(["examples:" if len(commands) > 1 else "example:", *commands])


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    value = number(int, text)
    if value is None or value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, but is {text!r} instead")
    return value


def node_range(text: str) -> tuple[int, int]:
    """Parse a number of nodes, or the least and the most, such as `2:4`."""
    least, colon, most = text.partition(":")
    found = (positive(least), positive(most if colon else least))
    if found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"must be MIN:MAX with MIN no larger than MAX, but is {text} instead")
    return found


def count(text: str) -> int:
    """Parse a whole number from 0."""
    value = number(int, text)
    if value is None or value < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number that is not negative, but is {text!r} instead")
    return value


def positive_number(text: str) -> float:
    """Parse a number above 0 and below 1e9, so that products of it stay finite."""
    value = number(float, text)
    if value is None or not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"must be a positive number below 1e9, but is {text!r} instead")
    return value


def number(kind: Callable[[str], _Number], text: str) -> _Number | None:
    """A number from a text; None where it is none."""
    try:
        return kind(text)
    except ValueError:
        return None


def fraction(text: str) -> float:
    """Parse a number above 0 and up to 1."""
    value = positive_number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be a fraction up to 1, such as 0.4, but is {text!r} instead")
    return value


def share(text: str) -> float:
    """Parse a share below one half: `5%` or `0.05`."""
    value = number(float, text.removesuffix("%"))
    value = value / 100 if value is not None and text.endswith("%") else value
    if value is None or not 0 < value < 0.5:
        raise argparse.ArgumentTypeError(f"must be a share below one half, such as 5%, but is {text!r} instead")
    return value


def normalizer_name(text: str) -> str:
    """Parse the name of a normalizer."""
    try:
        return check_normalizer(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def text_step(text: str) -> str:
    """Parse a text step."""
    try:
        return check_text_step(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, but is {text!r} instead") from error


def hub_name(text: str) -> str:
    """Parse the name of a repository on the hub."""
    if not is_hub_name(text):
        raise argparse.ArgumentTypeError(f"must be of the form USER/NAME, but is {text!r} instead")
    return text


def add_run_config(parser: argparse.ArgumentParser, example: str) -> None:
    """Add `--config` and `--set`, which name and override the configuration of a run."""
    parser.add_argument("--config", type=Path, help="YAML file of the run, or the name of a recipe")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help=f"override values, such as {example}; may be repeated",
    )


def add_decoding(parser: argparse.ArgumentParser, served: str = "") -> None:
    """Add the model and the options of decoding; `served` is what the model is where a server has it."""
    defaults = EvaluationConfig()
    parser.add_argument(
        "model", help=f"Hugging Face folder or hub name, such as RUN/export, or RUN/checkpoints/step-N{served}"
    )
    parser.add_argument(
        "--precision",
        choices=_PRECISIONS,
        default="auto",
        help="precision of the weights; auto: as stored (default: %(default)s)",
    )
    for option, default, meaning in (
        ("--batch-size", defaults.batch_size, "utterances decoded together on a rank"),
        ("--max-windows", defaults.max_windows, "encoder windows decoded together on a rank"),
        ("--beams", defaults.num_beams, "beams of a beam search; 1 decodes greedily"),
    ):
        parser.add_argument(
            option, type=positive, default=default, metavar="N", help=f"{meaning} (default: %(default)s)"
        )
    parser.add_argument(
        "--max-tokens-per-second",
        type=positive_number,
        default=defaults.max_tokens_per_second,
        metavar="NUMBER",
        help="token limit of a transcript: 16 plus this number per second of audio (default: %(default)s)",
    )
    parser.add_argument(
        "--static-cache",
        action="store_true",
        help="in beam searches, use a key-value cache of fixed size, which torch.compile needs",
    )
    add_ema(parser)
    add_local_rank(parser)


def add_ema(parser: argparse.ArgumentParser) -> None:
    """Add the choice between the moving averages and the weights of a checkpoint."""
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="of a checkpoint, take the moving averages of the weights (optimizer.ema_decay), or the weights of its "
        "step (default: what its run evaluates)",
    )


def decoding_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """The options of decoding as fields of `EvaluationConfig`."""
    return {
        "batch_size": parsed.batch_size,
        "max_windows": parsed.max_windows,
        "num_beams": parsed.beams,
        "max_tokens_per_second": parsed.max_tokens_per_second,
        "static_cache": parsed.static_cache,
        "ema": parsed.ema,
    }


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Add the options of scoring."""
    defaults = EvaluationConfig()
    parser.add_argument(
        "--normalizer",
        type=normalizer_name,
        default=defaults.normalizer,
        metavar="NAME",
        help=f"{', '.join(NORMALIZERS)}, or your own function as module:function (default: %(default)s)",
    )
    parser.add_argument(
        "--target-text",
        type=text_step,
        nargs="+",
        default=[],
        metavar="STEP",
        help=f"text steps of the run's `target_text`, applied before the normalizer: {', '.join(TEXT_STEPS)}, or your "
        "own function as module:function",
    )
    parser.add_argument(
        "--slices",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="also report error rates for each value of these fields",
    )
    parser.add_argument(
        "--speaker-field",
        default=defaults.speaker_field,
        metavar="FIELD",
        help="field that names the speaker; intervals resample whole speakers (default: %(default)s)",
    )


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Accept `--local_rank`, which DeepSpeed's launcher passes; ranks read the environment instead."""
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)

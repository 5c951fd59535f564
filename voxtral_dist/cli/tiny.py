"""`voxtral-dist tiny`."""

from __future__ import annotations

import argparse
from pathlib import Path

from voxtral_dist.cli.arguments import Commands, examples
from voxtral_dist.errors import UserError
from voxtral_dist.output.console import say


def add_tiny(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "tiny",
        help="make a tiny Voxtral with random weights as a Hugging Face folder",
        epilog=examples("voxtral-dist tiny models/tiny --set encoder_width=128 --set text_layers=4"),
    )
    parser.add_argument("out", type=Path, help="folder to make")
    # With one value each, because a folder may follow.
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a size, such as encoder_width=128; may be repeated",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    parser.set_defaults(run=_tiny)


def _tiny(parsed: argparse.Namespace) -> int:
    if parsed.out.exists() and not parsed.out.is_dir():
        raise UserError(f"{parsed.out} is a file: give the name of a folder to make.")
    from voxtral_dist.model.tiny import build_tiny_voxtral, tiny_shape

    build_tiny_voxtral(parsed.out, tiny_shape(parsed.set), parsed.seed)
    say(f"{parsed.out}: a tiny Voxtral with random weights")
    return 0

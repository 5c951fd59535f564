"""`voxtral-dist recipes`."""

from __future__ import annotations

import argparse

from voxtral_dist.cli.arguments import Commands, examples
from voxtral_dist.config import recipes, summary
from voxtral_dist.errors import UserError
from voxtral_dist.output.console import say


def add_recipes(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "recipes",
        help="list the configurations that come with the package, or print one",
        description="List the configurations that come with the package, or print one to edit it. `--config` takes "
        "their names too.",
        epilog=examples("voxtral-dist recipes", "voxtral-dist recipes voxtral_mini_lora > run.yaml"),
    )
    parser.add_argument("name", nargs="?", help="print this one")
    parser.set_defaults(run=_recipes)


def _recipes(parsed: argparse.Namespace) -> int:
    found = recipes()
    if parsed.name is None:
        width = max(map(len, found), default=0)
        for name, path in found.items():
            say(f"{name:<{width}}  {summary(path)}")
        say("\n`voxtral-dist recipes NAME > run.yaml` writes one, to edit its paths.")
        return 0
    if parsed.name not in found:
        raise UserError(f"There is no recipe {parsed.name!r}: the names are {', '.join(found)}.")
    say(found[parsed.name].read_text(encoding="utf-8"), end="")
    return 0

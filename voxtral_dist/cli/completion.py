"""`voxtral-dist completion`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from voxtral_dist.cli.arguments import Commands, examples
from voxtral_dist.errors import UserError
from voxtral_dist.output.console import say

# Arguments that are no `Path`, because a hub name or a URL may be there instead.
_FILES = ("model", "source", "shards", "corpus", "folder", "folders", "pattern", "audio", "audio_from")


def add_completion(commands: Commands[argparse.ArgumentParser], program: argparse.ArgumentParser) -> None:
    """Add the command, which completes all commands of `program`."""
    parser = commands.add_parser(
        "completion",
        help="print a script with which a shell completes commands, options and files",
        description="Print a script with which a shell completes commands, options and files. It needs nothing when "
        "it runs: print it again after an update.",
        epilog=examples(
            "voxtral-dist completion bash > ~/.local/share/bash-completion/completions/voxtral-dist",
            "voxtral-dist completion zsh > ~/.zfunc/_voxtral-dist",
            "voxtral-dist completion fish > ~/.config/fish/completions/voxtral-dist.fish",
        ),
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell that reads it")
    parser.set_defaults(run=partial(_completion, program))


def _completion(program: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    if find_spec("shtab") is None:
        raise UserError("Completion needs the package shtab: install it by `pip install 'voxtral-dist[completion]'`.")
    import shtab

    for action in _actions(program):
        if action.type is Path or action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # read by shtab
    say(shtab.complete(program, shell=parsed.shell), end="")
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)

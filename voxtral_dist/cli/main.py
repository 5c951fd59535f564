"""The entry point of `voxtral-dist`: dispatch to a command, error messages and exit codes."""

from __future__ import annotations

import argparse
import io
import logging
import multiprocessing
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any, NoReturn

from voxtral_dist.cli.arguments import add_local_rank, examples
from voxtral_dist.cli.completion import add_completion
from voxtral_dist.cli.config import add_config
from voxtral_dist.cli.doctor import add_doctor
from voxtral_dist.cli.evaluate import add_evaluate
from voxtral_dist.cli.export import add_export
from voxtral_dist.cli.init import add_init
from voxtral_dist.cli.launch import add_launch
from voxtral_dist.cli.plan import add_plan
from voxtral_dist.cli.recipes import add_recipes
from voxtral_dist.cli.report import add_report
from voxtral_dist.cli.score import add_score
from voxtral_dist.cli.shards import add_shards
from voxtral_dist.cli.tiny import add_tiny
from voxtral_dist.cli.train import add_train
from voxtral_dist.cli.transcribe import add_transcribe
from voxtral_dist.errors import LostPeerError, UserError, is_printed_here
from voxtral_dist.output.console import one_line, printable, say, set_up_logging

# Launchers start them on several ranks; all others are commands of one process.
_COMMANDS_OF_RANKS = ("train", "evaluate", "transcribe", "doctor")
_LOG_SECONDS = 10.0


def console(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command, and end the process with its exit code.

    The process ends by `os._exit` after its output is flushed: threads of torch and gloo that need the interpreter
    while it shuts down abort the process, so that a finished run would end with an error.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # Characters that the terminal's encoding lacks must not end the command.
        sys.stdout.reconfigure(errors="backslashreplace")
    # Read when torch is imported. Its C++ code would print a stack trace for each connection to a host that is gone.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:
        # The reader of the pipe, such as `head`, has ended.
        code = 0
    except BaseException:
        code = 1
        _say_last(traceback.format_exc(), code, end="")
        with suppress(Exception):
            _end_with_all_ranks(None)
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    # A data worker that hangs would stay.
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 an error of the user, 3 an error of one rank, 75 stopped and resumable."""
    set_up_logging()
    parsed = build_parser().parse_args(arguments)
    # DeepSpeed calls deprecated names of torch; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Where there is a CUDA toolkit and no GPU, torch says so before any message of ours.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # torchao, which transformers imports where it is installed, registers types in torch's trees twice.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    error: UserError | None = None
    try:
        _refuse_other_systems(parsed)
        code = parsed.run(parsed)
    except UserError as mistake:
        code, error = mistake.exit_code, mistake
        if parsed.command not in _COMMANDS_OF_RANKS or is_printed_here(error):
            _print_error(error)
    except KeyboardInterrupt:
        code = 130
    if code != 0 and parsed.command in _COMMANDS_OF_RANKS:
        have_all_printed = _end_with_all_ranks(error)
        is_printed = have_all_printed or error is None or is_printed_here(error) or isinstance(error, LostPeerError)
        if error is not None and not is_printed:
            # Twice is better than never.
            _print_error(error)
    sys.exit(code)


def _refuse_other_systems(parsed: argparse.Namespace) -> None:
    """Refuse what cannot work on Windows and macOS, before an import fails; docs/gpus.md says what can."""
    if sys.platform == "win32":
        raise UserError("voxtral-dist runs on Linux: on Windows, install and start it in WSL 2.")
    if sys.platform != "linux" and parsed.command in _COMMANDS_OF_RANKS and getattr(parsed, "server", None) is None:
        raise UserError(
            f"`{parsed.command}` computes with the model, on Linux only: take a Linux machine with a GPU, or one with "
            "CPUs to try things out. docs/serving.md says what serves a trained model on a Mac."
        )


def _print_error(error: UserError) -> None:
    _say_last(f"voxtral-dist: error: {one_line(str(error))}", error.exit_code)


def _say_last(text: str, code: int, end: str = "\n") -> None:
    """Say why this process ends. A rank ends anyway where its log is on storage that does not answer."""
    limit = threading.Timer(_LOG_SECONDS, os._exit, [code])
    limit.daemon = True
    if os.environ.get("WORLD_SIZE", "1") != "1":
        limit.start()
    say(text, to_errors=True, end=end)
    limit.cancel()


def _end_with_all_ranks(error: UserError | None) -> bool:
    """Wait until all ranks of a launcher have printed what they print; see `end_with_all_ranks`."""
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if is_alone or (error is None and "voxtral_dist.distributed.world" not in sys.modules):
        return True
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    # It imports torch, which commands do when they run.
    from voxtral_dist.distributed.world import end_with_all_ranks

    return end_with_all_ranks(error)


class _HelpFormatter(argparse.HelpFormatter):
    """Keeps the lines of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example") else super()._fill_text(text, width, indent)


class _Parser(argparse.ArgumentParser):
    """A parser whose messages are printable: arguments may be names of files that others made."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"formatter_class": _HelpFormatter} | options))

    def error(self, message: str) -> NoReturn:
        is_override = message.startswith("unrecognized arguments:") and "=" in message
        hint = " (each KEY=VALUE follows a --set of its own)" if is_override else ""
        super().error(printable(message) + hint)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands. It imports no heavy library: commands do so when they run."""
    parser: argparse.ArgumentParser = _Parser(
        prog="voxtral-dist",
        description="Fine-tune Voxtral on transcription.",
        epilog=examples(
            "voxtral-dist init run.yaml --audio train.jsonl --language French --gpu 'RTX 4090'",
            "voxtral-dist shards pack train.jsonl shards/data --encode flac --dev 5% --language fr",
            "voxtral-dist train --config run.yaml",
            "voxtral-dist evaluate runs/run/export shards/data/dev",
        ),
    )
    parser.add_argument("--version", action="version", version=f"voxtral-dist {version('voxtral-dist')}")
    # `deepspeed --no_python voxtral-dist train` gives it before the command.
    add_local_rank(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    add_train(commands)
    add_evaluate(commands)
    add_score(commands)
    add_transcribe(commands)
    add_export(commands)
    add_report(commands)
    add_shards(commands)
    add_plan(commands)
    add_config(commands)
    add_recipes(commands)
    add_init(commands)
    add_launch(commands)
    add_tiny(commands)
    add_doctor(commands)
    add_completion(commands, parser)
    return parser

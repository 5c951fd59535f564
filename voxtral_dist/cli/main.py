"""`voxtral-dist`: the command line, and the one place where an error becomes a sentence and an exit code."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from voxtral_dist.cli.plan import add_plan
from voxtral_dist.cli.report import add_report
from voxtral_dist.cli.score import add_score, add_scoring
from voxtral_dist.cli.shards import Commands, add_shards, count, positive
from voxtral_dist.cli.transcribe import add_decoding, add_transcribe, decoding_settings
from voxtral_dist.config import (
    EvaluationConfig,
    TestContextConfig,
    config_schema,
    dump_config,
    load_config,
)
from voxtral_dist.errors import RankError, UserError


def console(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command as a process of its own, and end the process with its exit code.

    Threads of torch and gloo may still ask for the interpreter while it is torn down, and abort the process: a finished
    run would end with an error then. So everything is written out, and the process ends at once.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A transcript or a name that the terminal's encoding lacks must not end the command.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough.
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 the user's mistake, 3 an error of one rank, 75 stopped and resumable."""
    parsed = build_parser().parse_args(arguments)
    # DeepSpeed's calls of older names in torch are nothing that a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        code = parsed.run(parsed)
    except UserError as error:
        # The ranks of a node meet the same mistake: one of them speaks.
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, RankError):
            print(f"voxtral-dist: error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def build_parser() -> argparse.ArgumentParser:
    """The grammar of the command line. Heavy libraries are imported by the commands that need them."""
    parser = argparse.ArgumentParser(prog="voxtral-dist", description="Fine-tune Voxtral on transcription.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_evaluate(commands)
    add_score(commands)
    add_transcribe(commands)
    add_report(commands)
    add_shards(commands)
    add_plan(commands)
    _add_config(commands)
    _add_tiny(commands)
    _add_doctor(commands)
    return parser


def _add_train(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("train", help="train, or go on with, the run of a configuration")
    parser.add_argument("--config", type=Path, help="YAML file of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="such as model.precision=float32"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    # DeepSpeed's launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(run=_train)


def _train(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)
    if parsed.print_config:
        print(dump_config(config), end="")
        return 0
    from voxtral_dist.distributed.world import joined_world
    from voxtral_dist.train import train

    with joined_world() as world:
        return train(config, world)


def _add_evaluate(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("evaluate", help="word error rate of a model folder on shard folders")
    add_decoding(parser)
    parser.add_argument("shards", nargs="+", help="folders made by `shards pack`")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder for NAME.json and NAME.jsonl")
    parser.add_argument("--no-loss", action="store_true", help="do not measure the loss of the targets")
    add_scoring(parser)
    parser.add_argument("--detect-language", action="store_true", help="do not tell the language; count what is named")
    parser.add_argument("--words", type=Path, metavar="FILE", help="decode with lists of words too, and report B-WER")
    parser.add_argument(
        "--distractors", type=count, nargs="+", metavar="N", help="of the lists, besides true words (default: 0 100)"
    )
    parser.set_defaults(run=_evaluate)


def _evaluate(parsed: argparse.Namespace) -> int:
    from voxtral_dist.distributed.world import joined_world
    from voxtral_dist.evaluate import EvaluationOptions, evaluate

    if parsed.distractors and parsed.words is None:
        raise UserError("`--distractors` are words of a list: name its file by `--words`.")
    sizes = {"num_distractors": tuple(parsed.distractors)} if parsed.distractors else {}
    options = EvaluationOptions(
        settings=EvaluationConfig(
            **decoding_settings(parsed),
            measures_loss=not parsed.no_loss,
            normalizer=parsed.normalizer,
            slices=tuple(parsed.slices),
            speaker_field=parsed.speaker_field,
        ),
        detect_language=parsed.detect_language,
        context=TestContextConfig(words=parsed.words, **sizes) if parsed.words else None,
        target_text=tuple(parsed.target_text),
    )
    with joined_world() as world:
        for name, score in evaluate(parsed.model, parsed.shards, options, parsed.precision, parsed.out, world):
            if world.is_first:
                print(f"{name}: {score}")
    return 0


def _add_config(commands: Commands[argparse.ArgumentParser]) -> None:
    config = commands.add_parser("config", help="about configurations").add_subparsers(required=True, metavar="ACTION")
    schema = config.add_parser("schema", help="print the JSON schema, for editors")
    schema.set_defaults(run=_schema)
    check = config.add_parser("check", help="check configurations and the files that they name for DeepSpeed")
    check.add_argument("configs", type=Path, nargs="+")
    check.set_defaults(run=_check)


def _schema(_: argparse.Namespace) -> int:
    print(config_schema())
    return 0


def _check(parsed: argparse.Namespace) -> int:
    from voxtral_dist.engine.build import check_engine, engine_name

    for path in parsed.configs:
        config = load_config(path)
        check_engine(config)
        print(f"{path}: {config.num_steps} steps of {config.model.path}, {engine_name(config.engine)}")
    return 0


def _add_tiny(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("tiny", help="make a tiny random Voxtral as a Hugging Face folder")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as encoder_width=128")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_tiny)


def _tiny(parsed: argparse.Namespace) -> int:
    from voxtral_dist.model.tiny import build_tiny_voxtral, tiny_shape

    if parsed.out.exists() and not parsed.out.is_dir():
        raise UserError(f"{parsed.out} is a file: give the name of a folder to make.")
    build_tiny_voxtral(parsed.out, tiny_shape(parsed.set), parsed.seed)
    print(f"{parsed.out}: a tiny Voxtral with random weights")
    return 0


def _add_doctor(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("doctor", help="check this machine, and build DeepSpeed's extensions with a limit")
    parser.add_argument("--build-timeout", type=positive, default=900, metavar="SECONDS")
    parser.add_argument("--with-offload", action="store_true", help="build also what offloading the optimizer needs")
    parser.add_argument("--with-nvme", action="store_true", help="build also what offloading to NVMe needs")
    parser.set_defaults(run=_doctor)


def _doctor(parsed: argparse.Namespace) -> int:
    from voxtral_dist.doctor import examine

    return examine(parsed.build_timeout, parsed.with_offload, parsed.with_nvme)

"""`voxtral-dist config`: the schema of configurations, and a check of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from voxtral_dist.cli.arguments import Commands, examples
from voxtral_dist.config import config_schema, load_config, refuse_missing_deepspeed_file
from voxtral_dist.output.console import say


def add_config(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command and its actions."""
    parser = commands.add_parser(
        "config",
        help="check configurations, or print their schema",
        epilog=examples("voxtral-dist config check run.yaml", "voxtral-dist config schema > schema.json"),
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    schema = actions.add_parser(
        "schema",
        help="print the JSON schema of configurations, for editors",
        epilog=examples("voxtral-dist config schema > schema.json"),
    )
    schema.set_defaults(run=_schema)
    check = actions.add_parser(
        "check",
        help="check configurations and the DeepSpeed files that they name",
        epilog=examples("voxtral-dist config check run.yaml other.yaml"),
    )
    check.add_argument("configs", type=Path, nargs="+", help="YAML files of runs")
    check.set_defaults(run=_check)


def _schema(_: argparse.Namespace) -> int:
    say(config_schema())
    return 0


def _check(parsed: argparse.Namespace) -> int:
    configs = [load_config(path) for path in parsed.configs]
    for config in configs:
        if config.engine.deepspeed is not None:
            refuse_missing_deepspeed_file(config.engine.deepspeed)
    from voxtral_dist.engine.build import check_engine, engine_name

    for path, config in zip(parsed.configs, configs, strict=True):
        check_engine(config)
        say(f"{path}: {config.length} of {config.model.path}, {engine_name(config.engine)}")
    return 0

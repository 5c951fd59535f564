"""`voxtral-dist train`."""

from __future__ import annotations

import argparse

from voxtral_dist.cli.arguments import Commands, add_local_rank, add_run_config, examples, positive
from voxtral_dist.cli.paths import refuse_missing_paths
from voxtral_dist.config import dump_config, load_config
from voxtral_dist.distributed.launchers import is_on_several_hosts
from voxtral_dist.output.console import say
from voxtral_dist.training.signals import stop_signals

_OVERFIT_STEPS = 100


def add_train(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "train",
        help="start or resume the run of a configuration",
        epilog=examples(
            "voxtral-dist train --config run.yaml --set num_steps=2000 optimizer.learning_rate=1e-5",
            "voxtral-dist train --config run.yaml --dry-run",
            "torchrun --nproc_per_node 8 --no_python voxtral-dist train --config run.yaml",
        ),
    )
    add_run_config(parser, "model.precision=float32")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="KEY",
        help="let a resumed run change this key or section, although its results before and after cannot be compared "
        "(model.precision, evaluation.normalizer, evaluation.test_sets.NAME, ...); may be repeated",
    )
    rehearsal = parser.add_mutually_exclusive_group()
    rehearsal.add_argument(
        "--dry-run",
        action="store_true",
        help="do all up to the first step, on all ranks: print data, labels of three examples and memory, load the "
        "model, and write nothing to run_dir",
    )
    rehearsal.add_argument(
        "--overfit-batch",
        type=positive,
        nargs="?",
        const=_OVERFIT_STEPS,
        metavar="N",
        help="train on one batch until its loss has fallen to a tenth, for at most N updates (default: %(const)s); "
        "exit code 1 where it was not learned; nothing is written to run_dir",
    )
    add_local_rank(parser)
    parser.set_defaults(run=_train)


def _train(parsed: argparse.Namespace) -> int:
    with stop_signals(ends_process=True):
        return _train_or_print(parsed)


def _train_or_print(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.set)
    if parsed.print_config:
        say(dump_config(config), end="")
        return 0
    if not is_on_several_hosts():
        refuse_missing_paths(config)
    if parsed.dry_run or parsed.overfit_batch is not None:
        from voxtral_dist.rehearse import dry_run, overfit_batch

        return dry_run(config, parsed.allow_changed) if parsed.dry_run else overfit_batch(config, parsed.overfit_batch)
    from voxtral_dist.train import train_model

    return train_model(config, parsed.allow_changed)

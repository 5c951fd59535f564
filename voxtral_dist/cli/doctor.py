"""`voxtral-dist doctor`."""

from __future__ import annotations

import argparse

from voxtral_dist.cli.arguments import Commands, add_local_rank, add_run_config, examples, positive
from voxtral_dist.config import load_config
from voxtral_dist.errors import UserError


def add_doctor(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine and build DeepSpeed's extensions, or check all hosts of a run",
        epilog=examples(
            "voxtral-dist doctor --with-offload",
            "torchrun --nproc_per_node 8 --no_python voxtral-dist doctor --distributed --config run.yaml",
        ),
    )
    parser.add_argument(
        "--build-timeout",
        type=positive,
        default=900,
        metavar="SECONDS",
        help="stop the build after this time (default: %(default)s)",
    )
    parser.add_argument(
        "--with-offload", action="store_true", help="also build what offloading the optimizer to host memory needs"
    )
    parser.add_argument("--with-nvme", action="store_true", help="also build what offloading to NVMe needs")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="check all hosts of the run of --config, and what is between them; started by a launcher, as train is",
    )
    add_run_config(parser, "run_dir=/shared/run")
    parser.add_argument(
        "--megabytes",
        type=positive,
        default=64,
        help="what each host writes to each folder, and each rank sends (default: %(default)s)",
    )
    add_local_rank(parser)
    parser.set_defaults(run=_doctor)


def _doctor(parsed: argparse.Namespace) -> int:
    if parsed.distributed:
        return _examine_hosts(parsed)
    if parsed.config is not None or parsed.set:
        raise UserError("`doctor` without `--distributed` checks this machine only: leave out `--config` and `--set`.")
    from voxtral_dist.doctor import examine

    return examine(parsed.build_timeout, parsed.with_offload, parsed.with_nvme)


def _examine_hosts(parsed: argparse.Namespace) -> int:
    if parsed.config is None:
        raise UserError("`doctor --distributed` needs `--config`: it checks the folders and shards of that run.")
    config = load_config(parsed.config, parsed.set)
    from voxtral_dist.distributed.world import joined_world
    from voxtral_dist.doctor import examine_hosts

    with joined_world(*config.distributed.timeouts) as world:
        return examine_hosts(config, parsed.megabytes, world)

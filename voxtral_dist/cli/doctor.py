"""`voxtral-dist doctor`."""

from __future__ import annotations

import argparse

from voxtral_dist.cli.arguments import Commands, positive


def add_doctor(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("doctor", help="check this machine, and build DeepSpeed's extensions")
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
    parser.set_defaults(run=_doctor)


def _doctor(parsed: argparse.Namespace) -> int:
    from voxtral_dist.doctor import examine

    return examine(parsed.build_timeout, parsed.with_offload, parsed.with_nvme)

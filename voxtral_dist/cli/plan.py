"""`voxtral-dist plan`."""

from __future__ import annotations

import argparse
import json

from voxtral_dist.cli.arguments import Commands, add_run_config, fraction, positive, positive_number
from voxtral_dist.config import load_config


def add_plan(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "plan", help="estimate the memory and time of a run, and whether it fits, without a GPU"
    )
    add_run_config(parser, "train_data.max_windows=4")
    parser.add_argument(
        "--gpus", type=positive, default=1, metavar="N", help="GPUs of all nodes together (default: %(default)s)"
    )
    parser.add_argument(
        "--gpus-per-node", type=positive, default=8, metavar="N", help="GPUs of one node (default: %(default)s)"
    )
    parser.add_argument("--gpu-memory", metavar="80GB", help="memory of one GPU, to report whether the run fits")
    parser.add_argument(
        "--host-memory", metavar="512GB", help="host memory of one node, to report whether the run fits"
    )
    parser.add_argument(
        "--mfu",
        type=fraction,
        default=0.4,
        help="model FLOPs utilization: fraction of the peak that training reaches (default: %(default)s)",
    )
    parser.add_argument(
        "--peak-tflops",
        type=positive_number,
        help="dense peak of one GPU, in TFLOP/s (default: metrics.peak_tflops, or 989, that of an H100)",
    )
    parser.add_argument(
        "--device",
        choices=("gpu", "cpu"),
        default="gpu",
        help="cpu: estimate a run whose ranks are processes on CPUs (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, sizes in bytes")
    parser.set_defaults(run=_plan)


def _plan(parsed: argparse.Namespace) -> int:
    from voxtral_dist.estimate.estimate import estimate_run
    from voxtral_dist.estimate.estimator import Machine
    from voxtral_dist.estimate.quantities import parse_bytes

    config = load_config(parsed.config, parsed.set)
    machine = Machine(
        num_gpus=parsed.gpus,
        gpus_per_node=parsed.gpus_per_node,
        device=parsed.device,
        gpu_memory=None if parsed.gpu_memory is None else parse_bytes(parsed.gpu_memory, "--gpu-memory"),
        host_memory=None if parsed.host_memory is None else parse_bytes(parsed.host_memory, "--host-memory"),
        mfu=parsed.mfu,
        peak_tflops=parsed.peak_tflops or config.metrics.peak_tflops or Machine.peak_tflops,
    )
    estimate = estimate_run(config, machine)
    if parsed.json:
        print(json.dumps(estimate.to_json(), indent=1))
    else:
        print("\n".join(estimate.lines()))
    return 0

"""`voxtral-dist plan`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from voxtral_dist.cli.arguments import Commands, add_run_config, examples, fraction, positive, positive_number
from voxtral_dist.config import load_config
from voxtral_dist.errors import UserError
from voxtral_dist.model.folders import refuse_wrong_model
from voxtral_dist.output.console import say
from voxtral_dist.progress import progress_of_command

if TYPE_CHECKING:
    from voxtral_dist.estimate.estimator import Machine


def add_plan(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "plan",
        help="estimate the memory and time of a run, and whether it fits, without a GPU",
        description="Estimate the memory and time of a run, and whether it fits, without a GPU. With --gpu or "
        "--gpu-memory but without --config: which recipes of the package fit, and how fast they are.",
        epilog=examples(
            "voxtral-dist plan --config run.yaml --gpu H100 --gpus 8",
            "voxtral-dist plan --gpu 'RTX 4090' --host-memory 64GB",
        ),
    )
    add_run_config(parser, "train_data.max_windows=4")
    parser.add_argument(
        "--gpus", type=positive, default=1, metavar="N", help="GPUs of all nodes together (default: %(default)s)"
    )
    parser.add_argument(
        "--gpus-per-node", type=positive, default=8, metavar="N", help="GPUs of one node (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu",
        metavar="H200",
        help="estimate kernels' time on this GPU, and whether the run fits: A100, A100 40GB, H100, H200, B200, A10, "
        "A40, L4, L40S, RTX A6000, RTX 6000 Ada, RTX 3090, RTX 4090, RTX 5090",
    )
    parser.add_argument(
        "--gpu-memory",
        metavar="80GB",
        help="memory of one GPU, to report whether the run fits (default: that of --gpu)",
    )
    parser.add_argument(
        "--host-memory", metavar="512GB", help="host memory of one node, to report whether the run fits"
    )
    parser.add_argument(
        "--mfu",
        type=fraction,
        help="model FLOPs utilization that you have measured, as a fraction (default: that of the roofline of --gpu)",
    )
    parser.add_argument(
        "--peak-tflops",
        type=positive_number,
        help="the rate that --mfu is a fraction of, in TFLOP/s (default: metrics.peak_tflops, or the rate of --gpu)",
    )
    parser.add_argument(
        "--device",
        choices=("gpu", "cpu"),
        default="gpu",
        help="cpu: estimate a run whose ranks are processes on CPUs (default: %(default)s)",
    )
    parser.add_argument(
        "--scale",
        nargs="+",
        type=positive,
        metavar="N",
        help="instead of all else, the time of a step and of the run on so many GPUs each, with communication, slow "
        "ranks, saves and evaluations; needs --config and --gpu",
    )
    parser.add_argument(
        "--network",
        default="ib-ndr",
        help="with --scale: between nodes: ib-hdr, ib-ndr, efa-p4d, efa-p5, tcp-100, tcp-25, or the bandwidth of a "
        "node such as 1600Gbps (default: %(default)s, 8 cards of 400 Gb/s)",
    )
    parser.add_argument(
        "--storage-bandwidth",
        default="1GB",
        metavar="1GB",
        help="with --scale: of the storage of shards and checkpoints, for all nodes together, in a second "
        "(default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON, sizes in bytes")
    parser.set_defaults(run=_plan)


def _plan(parsed: argparse.Namespace) -> int:
    if parsed.gpu is not None and parsed.device == "cpu":
        raise UserError("`--gpu` must not be given with `--device cpu`: remove one of them.")
    if parsed.config is not None:
        refuse_wrong_model(load_config(parsed.config, parsed.set).model.path)
    # These import torch.
    from voxtral_dist.estimate.estimate import STAGES, estimate_run
    from voxtral_dist.estimate.estimator import Machine
    from voxtral_dist.estimate.gpus import named_gpu
    from voxtral_dist.estimate.quantities import parse_bytes

    gpu = None if parsed.gpu is None else named_gpu(parsed.gpu)
    gpu_memory = None if gpu is None else gpu.memory_bytes
    if parsed.gpu_memory is not None:
        gpu_memory = parse_bytes(parsed.gpu_memory, "--gpu-memory")
    machine = Machine(
        num_gpus=parsed.gpus,
        gpus_per_node=parsed.gpus_per_node,
        device=parsed.device,
        gpu=gpu,
        gpu_memory=gpu_memory,
        host_memory=None if parsed.host_memory is None else parse_bytes(parsed.host_memory, "--host-memory"),
        mfu=parsed.mfu,
        peak_tflops=parsed.peak_tflops,
    )
    if parsed.scale is not None:
        return _print_scaling(parsed, machine)
    if parsed.config is None and gpu_memory is not None and parsed.device == "gpu":
        if parsed.set:
            raise UserError("`--set` needs `--config`: without it, the recipes of the package are estimated.")
        return _print_fitting_recipes(machine, as_json=parsed.json)
    config = load_config(parsed.config, parsed.set)
    machine = replace(machine, peak_tflops=parsed.peak_tflops or config.metrics.peak_tflops)
    with progress_of_command("plan", len(STAGES), prints_lines=False) as display:
        estimate = estimate_run(config, machine, lambda place: display.show(place, STAGES[place]))
    if parsed.json:
        say(json.dumps(estimate.to_json(), indent=1))
    else:
        say("\n".join(estimate.lines()))
    return 0


def _print_scaling(parsed: argparse.Namespace, machine: Machine) -> int:
    from voxtral_dist.estimate.interconnect import named_network
    from voxtral_dist.estimate.quantities import parse_bytes
    from voxtral_dist.estimate.scaling import estimate_scaling

    if parsed.config is None:
        raise UserError("`--scale` needs `--config`, the configuration of the run.")
    network = named_network(parsed.network)
    storage = parse_bytes(parsed.storage_bandwidth, "--storage-bandwidth")
    scaling = estimate_scaling(load_config(parsed.config, parsed.set), machine, parsed.scale, network, storage)
    say(json.dumps(scaling.to_json(), indent=1) if parsed.json else "\n".join(scaling.lines()))
    return 0


def _print_fitting_recipes(machine: Machine, *, as_json: bool) -> int:
    from voxtral_dist.estimate.fitting import fitting_recipes, lines_of_fits

    with progress_of_command("plan: recipe", None, prints_lines=False) as display:
        fits = fitting_recipes(machine, lambda done, total: display.show(done, total=total))
    if as_json:
        say(json.dumps([fit.to_json() for fit in fits], indent=1))
    else:
        say("\n".join(lines_of_fits(fits, machine)))
    return 0

"""`voxtral-dist init`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from voxtral_dist.cli.arguments import Commands, examples, positive
from voxtral_dist.config import edited_recipe, load_config, recipes
from voxtral_dist.config.yaml_text import parse_yaml
from voxtral_dist.errors import UserError
from voxtral_dist.output.console import say
from voxtral_dist.output.counting import counted
from voxtral_dist.text.languages import language_code
from voxtral_dist.text.scripts import has_spaces_between_words

if TYPE_CHECKING:
    from voxtral_dist.estimate.estimator import Machine
    from voxtral_dist.estimate.fitting import Fit

_TRAINED = {"all": ("all weights",), "lora": ("LoRA", "LoRA beside 4 bits"), "any": ()}
_EXTRAS = {"LoRA": "lora", "LoRA beside 4 bits": "qlora"}


def add_init(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "init",
        help="write the configuration of a run that fits this data and machine, and print the commands to run",
        description="Write the configuration of a run: a recipe of the package that fits the machine, as estimated by "
        "`voxtral-dist plan`. At a terminal, what is not given is asked for.",
        epilog=examples("voxtral-dist init run.yaml --audio train.jsonl --language French --gpu 'RTX 4090'"),
    )
    parser.add_argument("file", type=Path, help="configuration to write, such as run.yaml")
    parser.add_argument(
        "--audio", metavar="CORPUS", help="what `shards pack` reads: a manifest, table, folder or dataset"
    )
    parser.add_argument("--language", metavar="LANGUAGE", help="language of the audio, if it is one: a code or a name")
    parser.add_argument("--gpu", metavar="NAME", help='GPU by name, such as "RTX 4090"')
    parser.add_argument("--gpu-memory", metavar="24GB", help="memory of a GPU that `plan --gpu` does not know")
    parser.add_argument("--cpu", action="store_true", help="no GPU: a tiny model of random weights, to try things out")
    parser.add_argument("--gpus", type=positive, metavar="N", help="GPUs, or processes on CPUs, of all nodes together")
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--host-memory", metavar="64GB", help="host memory of a node; offloading is for known ones only"
    )
    parser.add_argument(
        "--train", choices=tuple(_TRAINED), default="any", help="all weights, or LoRA (default: all if they fit)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.set_defaults(run=_init)


def _init(parsed: argparse.Namespace) -> int:
    if parsed.file.exists() and not parsed.overwrite:
        raise UserError(f"{parsed.file} exists: give another name, or --overwrite.")
    if not parsed.file.parent.is_dir():
        raise UserError(f"The folder {parsed.file.parent} does not exist: make it first.")
    _ask_for_missing(parsed)
    if parsed.gpus > parsed.gpus_per_node and parsed.gpus % parsed.gpus_per_node:
        raise UserError(
            f"`--gpus` must be those of whole nodes of {parsed.gpus_per_node}, but is {parsed.gpus} instead: say by "
            "--gpus-per-node how many a node has."
        )
    try:
        language = language_code(parsed.language)
    except ValueError as error:
        raise UserError(f"`--language` {error}.") from error
    values: dict[str, Any] = {
        "run_dir": f"runs/{parsed.file.stem}",
        "train_data.shards": ["shards/data/train"],
        "evaluation.test_sets": {"dev": {"shards": "shards/data/dev", "max_utterances": 2000}},
    }
    if language is not None and not has_spaces_between_words("", language):
        values["evaluation.selection"] = {"test_set": "dev", "metric": "cer"}
    if parsed.cpu:
        recipe, head, before = _for_cpus(parsed, values)
    else:
        recipe, head, before = _for_gpus(parsed, values)
    commands = [*before, _pack(parsed, language), "voxtral-dist shards inspect shards/data/train shards/data/dev"]
    commands += [_plan(parsed), _start(parsed)]
    heading = "\n".join([*head, "Commands:", *(f"  {command}" for command in commands)])
    parsed.file.write_text(
        edited_recipe(recipes()[recipe].read_text(encoding="utf-8"), values, heading), encoding="utf-8"
    )
    load_config(parsed.file)
    say("\n".join([*head, f"Written to {parsed.file}. Now run:", *(f"  {command}" for command in commands)]))
    return 0


def _ask_for_missing(parsed: argparse.Namespace) -> None:
    """Ask for what was not given, at a terminal; anywhere else, a corpus and a machine must be given."""
    has_machine = parsed.cpu or parsed.gpu or parsed.gpu_memory
    # Where it is closed, there is none.
    if sys.stdin is None or not sys.stdin.isatty():
        if not (parsed.audio and has_machine):
            raise UserError(
                "Give --audio, and the machine by --gpu, --gpu-memory or --cpu; at a terminal they are asked for."
            )
    else:
        parsed.audio = parsed.audio or _asked("Audio and texts (a manifest, table, folder or hf:NAME)", None)
        of_all = "Language (empty: several, or said by the corpus)"
        parsed.language = parsed.language or _asked(of_all, "", _check_language)
        if not has_machine:
            parsed.gpu = _asked("GPU, such as RTX 4090 (empty: none)", "", _check_gpu)
            parsed.cpu = not parsed.gpu
        if parsed.gpus is None:
            what = "CPU processes" if parsed.cpu else "GPUs of all nodes together"
            parsed.gpus = positive(_asked(what, "1", _check_number))
        if parsed.host_memory is None and not parsed.cpu:
            question = "Host memory of a node, such as 64GB (empty: no offloading)"
            parsed.host_memory = _asked(question, "", _check_memory) or None
    parsed.gpus = parsed.gpus or 1


def _asked(question: str, default: str | None, check: Callable[[str], None] = lambda _: None) -> str:
    """The answer to a question, which is asked again while `check` refuses it.

    Raises:
        UserError: the input has ended.
    """
    while True:
        try:
            answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip()
        except EOFError as error:
            raise UserError("The input ended before all was answered: nothing is written.") from error
        if not answer and default is not None:
            return default
        try:
            check(answer)
        except UserError as error:
            say(f"  {error}")
            continue
        if answer:
            return answer


def _check_language(name: str) -> None:
    try:
        language_code(name)
    except ValueError as error:
        raise UserError(f"The answer {error}.") from error


def _check_number(text: str) -> None:
    try:
        positive(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"The answer {error}.") from error


def _check_gpu(name: str) -> None:
    from voxtral_dist.estimate.gpus import named_gpu

    named_gpu(name)


def _check_memory(amount: str) -> None:
    from voxtral_dist.estimate.quantities import parse_bytes

    parse_bytes(amount, "--host-memory")


def _for_cpus(parsed: argparse.Namespace, values: dict[str, Any]) -> tuple[str, list[str], list[str]]:
    values |= {"model.path": "models/tiny", "train_data.slots_per_step": max(2, parsed.gpus)}
    head = [
        "A tiny Voxtral of random weights on CPUs, to try data and commands out.",
        "Written by `voxtral-dist init` from the recipe demo.",
    ]
    return "demo", head, ["voxtral-dist tiny models/tiny"]


def _for_gpus(parsed: argparse.Namespace, values: dict[str, Any]) -> tuple[str, list[str], list[str]]:
    machine = _machine(parsed)
    fit = _chosen(machine, parsed.train)
    for override in fit.overrides:
        key, _, value = override.partition("=")
        values[key] = parse_yaml(value)
    from voxtral_dist.estimate.quantities import gigabytes

    assert machine.gpu_memory is not None
    label = parsed.gpu or "GPU"
    head = [
        f"{fit.trains[0].upper()}{fit.trains[1:]} of {fit.config.model.path} on {counted(machine.num_gpus, label)}: "
        f"{gigabytes(fit.row.device_bytes)} of {gigabytes(machine.gpu_memory)} per GPU and "
        f"{gigabytes(fit.row.host_bytes_of_node)} of host memory per node, as estimated by `voxtral-dist plan`.",
        f"Written by `voxtral-dist init` from the recipe {fit.recipe}.",
    ]
    extra = _EXTRAS.get(fit.trains)
    return fit.recipe, head, [f"pip install 'voxtral-dist[{extra}]'"] if extra else []


def _machine(parsed: argparse.Namespace) -> Machine:
    from voxtral_dist.estimate.estimator import Machine
    from voxtral_dist.estimate.gpus import named_gpu
    from voxtral_dist.estimate.quantities import parse_bytes

    given = parsed.gpu_memory
    memory = parse_bytes(given, "--gpu-memory") if given else named_gpu(parsed.gpu).memory_bytes
    host = None if parsed.host_memory is None else parse_bytes(parsed.host_memory, "--host-memory")
    # Its name is left out: no times are needed.
    return Machine(parsed.gpus, parsed.gpus_per_node, gpu_memory=memory, host_memory=host)


def _chosen(machine: Machine, trained: str) -> Fit:
    """The first recipe that fits: all weights before adapters, GPUs' memory before host memory."""
    from voxtral_dist.estimate.fitting import fitting_recipes, preferred_fit

    say("Estimating which recipes fit ...", to_errors=True)
    chosen = preferred_fit(machine, _TRAINED[trained])
    if chosen is None:
        fits = [fit for fit in fitting_recipes(machine) if not _TRAINED[trained] or fit.trains in _TRAINED[trained]]
        least = min(fit.row.device_bytes for fit in fits) / 1e9
        raise UserError(
            f"No recipe fits. The smallest needs {least:.1f} GB on each GPU; `voxtral-dist plan --gpu-memory` "
            "lists all. Training that moves weights to host memory is for machines with a known --host-memory."
        )
    return chosen


def _pack(parsed: argparse.Namespace, language: str | None) -> str:
    said = f" --language {language}" if language else ""
    return f"voxtral-dist shards pack {shlex.quote(parsed.audio)} shards/data --encode flac --dev 5%{said}"


def _plan(parsed: argparse.Namespace) -> str:
    command = f"voxtral-dist plan --config {shlex.quote(str(parsed.file))} --gpus {parsed.gpus}"
    if parsed.cpu:
        return f"{command} --device cpu"
    options = {"--gpu": parsed.gpu, "--gpu-memory": parsed.gpu_memory, "--host-memory": parsed.host_memory}
    if parsed.gpus_per_node < parsed.gpus:
        options["--gpus-per-node"] = str(parsed.gpus_per_node)
    return command + "".join(f" {name} {shlex.quote(value)}" for name, value in options.items() if value)


def _start(parsed: argparse.Namespace) -> str:
    file, of_node = shlex.quote(str(parsed.file)), min(parsed.gpus, parsed.gpus_per_node)
    if parsed.gpus > parsed.gpus_per_node:
        nodes = -(-parsed.gpus // parsed.gpus_per_node)
        return (
            f"torchrun --nnodes {nodes} --nproc_per_node {of_node} --rdzv_backend c10d "
            f"--rdzv_endpoint FIRST_HOST:29400 --no_python voxtral-dist train --config {file}   # on every node"
        )
    device = "DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 " if parsed.cpu else ""
    return f"{device}torchrun --nproc_per_node {of_node} --no_python voxtral-dist train --config {file}"

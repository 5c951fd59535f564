"""`voxtral-dist export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from voxtral_dist.cli.arguments import Commands, add_ema, examples, hub_name
from voxtral_dist.cli.paths import refuse_missing_source
from voxtral_dist.config import CardConfig
from voxtral_dist.errors import UserError
from voxtral_dist.output.console import say


def add_export(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "export",
        help="write a trained model or its adapters for another software",
        epilog=examples(
            "voxtral-dist export runs/first models/first --layout mistral",
            "voxtral-dist export runs/first models/first --push USER/voxtral-first --license apache-2.0",
        ),
    )
    parser.add_argument(
        "source",
        help="folder of a run (its selected checkpoint, or else the newest), checkpoint, or model folder or hub name",
    )
    parser.add_argument("out", type=Path, help="folder to write; an older one is replaced")
    parser.add_argument(
        "--layout",
        choices=["hf", "mistral", "peft", "vllm-lora"],
        default="hf",
        help="hf: the full model for transformers, peft and llama.cpp; mistral: for vLLM; peft: adapters alone; "
        "vllm-lora: adapters alone, in vLLM's names (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="precision of the full model's weights (default: that of the run, and bfloat16 for float16)",
    )
    add_ema(parser)
    parser.add_argument(
        "--push", metavar="USER/NAME", help="also upload the folder to this repository on the Hugging Face hub"
    )
    parser.add_argument(
        "--public", action="store_true", help="with --push: everybody may see the repository (default: private)"
    )
    card = parser.add_argument_group("model card", "statements that go before those of the run (export.card)")
    card.add_argument("--license", metavar="NAME", help="licence of the model, such as apache-2.0")
    card.add_argument("--data-license", metavar="TEXT", help="licence of the training data, in any words")
    card.add_argument("--base-model", type=hub_name, metavar="USER/NAME", help="the initial model's name on the hub")
    parser.set_defaults(run=_export)


def _export(parsed: argparse.Namespace) -> int:
    if parsed.public and parsed.push is None:
        raise UserError("`--public` says who may see the repository of `--push`: add `--push USER/NAME`.")
    refuse_missing_source(parsed.source)
    from voxtral_dist.export import export
    from voxtral_dist.hub.repository import Destination

    card = CardConfig(
        license=parsed.license or None, data_license=parsed.data_license or None, base_model=parsed.base_model
    )
    destination = None if parsed.push is None else Destination(parsed.push, parsed.public)
    repository = export(parsed.source, parsed.out, parsed.layout, parsed.precision, parsed.ema, card, destination)
    say(f"{parsed.layout}: {parsed.out}")
    if repository is not None:
        say(f"pushed: {repository.url} ({'private' if repository.is_private else 'public'})")
    return 0

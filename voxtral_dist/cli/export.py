"""`voxtral-dist export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from voxtral_dist.cli.arguments import Commands, add_ema


def add_export(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("export", help="write a trained model or its adapters for another software")
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
    parser.set_defaults(run=_export)


def _export(parsed: argparse.Namespace) -> int:
    from voxtral_dist.export import export

    export(parsed.source, parsed.out, parsed.layout, parsed.precision, parsed.ema)
    print(f"{parsed.layout}: {parsed.out}")
    return 0

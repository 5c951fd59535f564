"""Command line and JSON output of all benchmarks."""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def run(document: str | None, measure: Callable[[Path, bool], dict[str, Any]], shown: Sequence[str]) -> None:
    """Measure, write the result as JSON, and print part of it.

    Args:
        document: the benchmark's own description.
        measure: takes an empty folder, and whether a smoke run is enough, whose figures mean nothing.
        shown: the keys of the result to print.
    """
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a smoke run, whose figures mean nothing")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), parsed.quick)
    parsed.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in shown}))

"""Results of `gpu.py` on disk after every contender, and what is concluded from them."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from voxtral_dist.files import write_atomically

from rivals.training_runs import OURS, TRAINER
from workloads.gpu_contenders import COMPARED_BATCH_SIZE, CONTENDERS
from workloads.gpu_inputs import CLIP_SECONDS
from workloads.gpu_table import line, markdown
from workloads.speech import source

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "triton")

Rows = Mapping[str, Mapping[str, Any]]


class Results:
    """Everything that was measured, which is on disk after each addition.

    output: the JSON file; tables in Markdown come beside it.
    started: when the run began, by `time.monotonic`.
    """

    def __init__(self, output: Path, started: float) -> None:
        self._output = output
        self._started = started
        self.rows: dict[str, dict[str, Any]] = {}
        self._all: dict[str, Any] = {
            "ratio": None,
            "ratio_is": "clips per second of ours over Seq2SeqTrainer, full fine-tuning at batch 8, the best of each",
            "aims": "not measured",
            "contenders": self.rows,
            "command": shlex.join(["benchmarks/gpu.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
            "source": source(),
            "clip_seconds": CLIP_SECONDS,
        }

    def add(self, **facts: Any) -> None:
        """Add facts of the whole run."""
        self._all |= facts
        self._write()

    def add_row(self, name: str, row: dict[str, Any]) -> None:
        """Add a contender, and print its line."""
        self.rows[name] = row
        self.add(ratio=_ratio(self.rows), aims=_aims(self.rows))
        print(line(name, row), flush=True)

    def markdown(self) -> str:
        """The tables."""
        return markdown(self._all)

    def _write(self) -> None:
        self._all["seconds"] = time.monotonic() - self._started
        self._output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._output, json.dumps(self._all, indent=1) + "\n")
        write_atomically(self._output.with_suffix(".md"), self.markdown())


def _ratio(rows: Rows) -> float | None:
    """None where one of both has no run that fits."""
    ours, theirs = (_full(rows, script, "clips_per_second") for script in (OURS, TRAINER))
    return max(ours.values()) / max(theirs.values()) if ours and theirs else None


def _aims(rows: Rows) -> list[dict[str, Any]]:
    """What is aimed at, and the best of ours; None where it was not measured."""
    peaks, utilization, rates = (_full(rows, OURS, key) for key in ("peak_device_bytes", "mfu", "clips_per_second"))
    offloaded = {
        name: float(rows[name]["peak_device_bytes"])
        for name in ("zero3_offload",)
        if _has(rows, name, "peak_device_bytes")
    }
    return [
        _aim("GB at batch 8, less than", 40, min(_gigabytes(peaks), key=_value, default=None)),
        _aim("GB with everything offloaded, less than", 16, min(_gigabytes(offloaded), key=_value, default=None)),
        _aim("MFU, at least", 0.45, max(utilization.items(), key=_value, default=None)),
        _aim("clips per second, at least", 11, max(rates.items(), key=_value, default=None)),
    ]


def _aim(sentence: str, wanted: float, best: tuple[str, float] | None) -> dict[str, Any]:
    contender, measured = best or (None, None)
    return {"aim": sentence, "wanted": wanted, "measured": measured, "by": contender}


def _gigabytes(sizes: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(name, size / 1e9) for name, size in sizes.items()]


def _value(named: tuple[str, float]) -> float:
    return named[1]


def _full(rows: Rows, script: str, key: str) -> dict[str, float]:
    """A figure of every contender of one side that trains all weights on the device at batch 8."""
    return {
        name: float(rows[name][key])
        for name, one in CONTENDERS.items()
        if one.script == script and one.is_full and one.batch_size == COMPARED_BATCH_SIZE and _has(rows, name, key)
    }


def _has(rows: Rows, name: str, key: str) -> bool:
    return key in rows.get(name, {})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

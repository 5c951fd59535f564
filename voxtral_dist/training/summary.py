"""`summary.json`: the outcome of a finished run in one file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.files import write_atomically
from voxtral_dist.training.metrics_file import read_metrics
from voxtral_dist.training.selection import Verdict


def write_summary(run_dir: Path, test_set: str | None, progress: TrainProgress, verdict: Verdict, **run: Any) -> None:
    """Write `summary.json` from the recorded metrics.

    Args:
        run_dir: of the run.
        test_set: whose error rates are given, of the initial and of the exported weights; None where the run has no
            test set.
        progress: at the end of the run.
        verdict: which step was exported.
        run: more entries, such as the number of ranks.
    """
    recorded = read_metrics(run_dir / "metrics.jsonl")
    evaluations = [row for row in recorded if row["kind"] == "evaluation" and row["name"] == test_set]
    exported_step = verdict.best_step or progress.step
    summary = {
        "test_set": test_set,
        **_error_rates(evaluations, exported_step),
        "train_seconds": round(progress.train_seconds, 2),
        "audio_seconds_per_second": round(progress.audio_seconds / progress.train_seconds, 2),
        **_efficiency([row for row in recorded if row["kind"] == "train"]),
        "num_steps": progress.step,
        "exported_step": exported_step,
        f"best_{verdict.metric}": verdict.best_rate,
        "num_bad_utterances": progress.num_bad_utterances,
        "num_too_long": progress.num_too_long,
        "num_skipped_updates": progress.guards.num_skipped,
        **run,
    }
    write_atomically(run_dir / "summary.json", json.dumps(summary, indent=1))


def exported_step(run_dir: Path) -> int | None:
    """The step whose weights a finished run exported; None where that is not known."""
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        return int(summary["exported_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _error_rates(rows: Sequence[dict[str, Any]], exported_step: int) -> dict[str, Any]:
    """The error rates of one test set before training and of the exported weights, where they were measured."""
    last = next((row for row in reversed(rows) if row["step"] <= exported_step), None)
    return {
        "wer_before": rows[0]["wer"] if rows and rows[0]["step"] == 0 else None,
        "wer_after": last["wer"] if last else None,
        "cer_before": rows[0].get("cer") if rows and rows[0]["step"] == 0 else None,
        "cer_after": last.get("cer") if last else None,
        "num_utterances": last["num_utterances"] if last else 0,
    }


def _efficiency(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Means over training time, and the peak memory, of the rows that have these values."""
    rows = [row for row in rows if "waiting_seconds" in row]
    measured = [row for row in rows if row["model_flops_utilization"] is not None]
    seconds = sum(row["step_seconds"] for row in measured)
    used = sum(row["model_flops_utilization"] * row["step_seconds"] for row in measured)
    waiting = sum(row["waiting_seconds"] for row in rows)
    return {
        "model_flops_utilization": round(used / seconds, 4) if seconds else None,
        "waiting_fraction": round(waiting / sum(row["step_seconds"] for row in rows), 4) if rows else None,
        "memory_gigabytes": max((row["memory_gigabytes"] for row in rows), default=None),
    }

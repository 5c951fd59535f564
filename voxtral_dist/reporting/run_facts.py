"""Facts of a run for its report: what was trained on what, for how long, when, and by which versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from voxtral_dist.config import RunConfig
from voxtral_dist.output.counting import counted
from voxtral_dist.output.duration import duration
from voxtral_dist.reporting.results_folder import ResultsFolder
from voxtral_dist.scoring.tables import format_audio
from voxtral_dist.text.json_text import parse_json


def read_summary(path: Path) -> Mapping[str, Any]:
    """The contents of `summary.json`; empty for a run that has not ended, and for a damaged file."""
    if not path.is_file():
        return {}
    try:
        summary = parse_json(path.read_bytes())
    except ValueError:
        return {}
    return summary if isinstance(summary, dict) else {}


def run_facts(folder: ResultsFolder, summary: Mapping[str, Any]) -> dict[str, str]:
    """Facts by name, in the order in which a report shows them; only those that are known."""
    starts = [row for row in folder.rows if row.get("event") in ("started", "resumed")]
    facts = dict(_shown_step(folder))
    if folder.config is not None:
        facts |= _of_config(folder.config)
    if starts:
        facts |= dict(_of_starts(starts))
    return facts | dict(_of_summary(summary, starts))


def trained_parameters(config: RunConfig) -> str:
    """What a run trains, such as `LoRA adapters of rank 16 in language model`."""
    lora, frozen = config.trainable.lora, config.trainable.frozen
    if lora is None:
        return f"all but {', '.join(f'`{one}`' for one in frozen)}" if frozen else "all"
    kind = "DoRA" if lora.use_dora else "LoRA"
    whole = f", and the whole {listed(lora.trained_whole)}" if lora.trained_whole else ""
    return f"{kind} adapters of rank {lora.rank} in {listed(list(lora.targets))}{whole}"


def listed(components: Sequence[str]) -> str:
    """Names of components in a sentence."""
    return " and ".join(one.replace("_", " ") for one in components)


def _shown_step(folder: ResultsFolder) -> Iterator[tuple[str, str]]:
    if folder.step is not None:
        others = f", of {counted(len(folder.steps), 'evaluated step')}" if len(folder.steps) > 1 else ""
        yield "Step", f"{folder.step:,}{others}"


def _of_config(config: RunConfig) -> dict[str, str]:
    optimizer = config.optimizer
    return {
        "Model": config.model.path,
        "Trained": trained_parameters(config),
        "Precision": config.model.precision,
        "Length of the run": config.length,
        "Learning rate": f"{optimizer.learning_rate:g} ({optimizer.algorithm})",
        "Seed": str(config.seed),
    }


def _of_starts(starts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    newest = starts[-1]
    if isinstance(seconds := newest.get("audio_seconds"), dict) and seconds:
        languages = ", ".join(f"{language} {format_audio(one)}" for language, one in seconds.items())
        yield "Training audio", f"{format_audio(sum(seconds.values()))}: {languages}"
    if isinstance(count := newest.get("num_utterances"), int):
        skipped = newest.get("skipped") or {}
        num_skipped = sum(skipped.values())
        yield "Utterances", f"{count - num_skipped:,}" + (f", {num_skipped:,} others skipped" if num_skipped else "")
    if isinstance(epochs := newest.get("num_epochs"), int | float):
        yield "Epochs", f"{epochs:.4g}"
    if isinstance(began := starts[0].get("started_at"), str) and (date := _minute(began)):
        times = len(starts) - 1
        yield "Started", date + (f", resumed {counted(times, 'time')}" if times else "")
    if isinstance(versions := newest.get("versions"), dict):
        yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _of_summary(summary: Mapping[str, Any], starts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Facts that only a finished run has."""
    if (seconds := summary.get("train_seconds")) is not None:
        yield "Time of training", duration(float(seconds))
    newest = starts[-1] if starts else {}
    engine, ranks = (summary.get(name, newest.get(name)) for name in ("engine", "world_size"))
    if engine is not None:
        yield "Engine", str(engine)
    if ranks is not None:
        device = newest.get("device")
        yield "Ranks", f"{ranks} × {device}" if device else str(ranks)


def _minute(text: str) -> str:
    """A time such as `2026-11-30 04:05 UTC`; empty if the text is none."""
    try:
        return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return ""

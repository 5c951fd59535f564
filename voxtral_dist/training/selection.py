"""The best checkpoint of a run by its word or character error rate, and the end of a run that no longer improves."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist.config import ErrorRate, GuardConfig, SelectionConfig
from voxtral_dist.errors import UserError
from voxtral_dist.files import write_atomically
from voxtral_dist.output.counting import counted
from voxtral_dist.scoring.deciding_rate import deciding_rate
from voxtral_dist.text.json_text import parse_json

_BEST_FILE = "best.json"
# Tolerance of comparisons. Different rates of a set with N words differ by at least 1 / N.
_ROUNDING = 1e-9
# Error rate by step.
_Curve = dict[int, float]


@dataclass(frozen=True)
class Verdict:
    """The outcome of judging the evaluations of a run.

    best_step: step of the best checkpoint; None where there is none yet, or where none is selected.
    best_rate: its error rate, by `metric`.
    messages: for the log.
    must_stop: whether the configuration ends the run here.
    test_set: by which it was selected.
    """

    best_step: int | None = None
    best_rate: float | None = None
    messages: tuple[str, ...] = ()
    must_stop: bool = False
    metric: ErrorRate = "wer"
    test_set: str | None = None


def judge(settings: SelectionConfig, rows: Sequence[dict[str, Any]], saved_steps: Collection[int]) -> Verdict:
    """Judge a run by its rows of kind `evaluation`. The last row of a step and a test set counts.

    Candidates are the steps of existing checkpoints within the limit of the guard. The initial model is not one.
    """
    found = _curve(settings.test_set, rows, settings.metric)
    curve = {step: rate for step, rate in found.items() if step > 0}
    guard_curve = _curve(settings.guard.test_set, rows, settings.guard.metric) if settings.guard else {}
    broken = _broken_steps(settings.guard, guard_curve)
    candidates = {step: rate for step, rate in curve.items() if step in saved_steps and step not in broken}
    best_step = min(candidates, key=lambda step: (candidates[step], step), default=None)
    messages, must_stop = _words_without_spaces(settings, rows), False
    if settings.guard and guard_curve and max(guard_curve) in broken:
        messages.append(_guard_message(settings.guard, guard_curve))
        must_stop = settings.guard.action == "stop"
    waited = _evaluations_without_improvement(curve, settings.min_improvement)
    if settings.patience is not None and waited >= settings.patience:
        must_stop = True
        messages.append(
            f"the {settings.metric.upper()} of `{settings.test_set}` has not improved in "
            f"{counted(waited, 'evaluation')} (`evaluation.selection.patience`): the run stops"
        )
    best_rate = None if best_step is None else candidates[best_step]
    return Verdict(best_step, best_rate, tuple(messages), must_stop, settings.metric, settings.test_set)


def refuse_guard_without_start(guard: GuardConfig, rows: Sequence[dict[str, Any]]) -> None:
    """Refuse a guard that has nothing to compare with.

    Raises:
        UserError: a resumed run did not measure the guard's test set at its start.
    """
    if 0 not in _curve(guard.test_set, rows, guard.metric):
        raise UserError(
            f"`evaluation.selection.guard`: the run did not measure `{guard.test_set}` at its start, so there is no "
            f"{guard.metric.upper()} to compare with: remove the guard, or start again in another `run_dir`."
        )


def write_best(run_dir: Path, verdict: Verdict) -> None:
    """Name the best checkpoint in `best.json`; remove the file where there is none."""
    if verdict.best_step is None:
        (run_dir / _BEST_FILE).unlink(missing_ok=True)
        return
    checkpoint = f"checkpoints/step-{verdict.best_step:07d}"
    best = {"step": verdict.best_step, verdict.metric: verdict.best_rate, "checkpoint": checkpoint}
    write_atomically(run_dir / _BEST_FILE, json.dumps(best, indent=1))


def selected_step(run_dir: Path) -> int | None:
    """The step of the best checkpoint of a run; None where the run selected none.

    Raises:
        UserError: `best.json` is damaged.
    """
    path = run_dir / _BEST_FILE
    if not path.is_file():
        return None
    try:
        return int(parse_json(path.read_bytes())["step"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is damaged: remove it, and rerun the training command to write it again.") from error


def _curve(name: str, rows: Sequence[dict[str, Any]], metric: ErrorRate) -> _Curve:
    return {row["step"]: row[metric] for row in rows if row["name"] == name and row.get(metric) is not None}


def _words_without_spaces(settings: SelectionConfig, rows: Sequence[dict[str, Any]]) -> list[str]:
    """A warning at the first evaluation of a run whose WER cannot tell checkpoints apart."""
    first = next((row for row in rows if row["name"] == settings.test_set), {})
    is_first = all(row["step"] == first.get("step") for row in rows)
    num_without = first.get("num_without_spaces", 0)
    if settings.metric == deciding_rate(num_without, first.get("num_utterances", 0), settings.metric) or not is_first:
        return []
    return [
        f"`{settings.test_set}` has {num_without} of {counted(first['num_utterances'], 'utterance')} in languages "
        "without spaces between words, where a transcript is right or wrong as a whole: set "
        "`evaluation.selection.metric: cer`"
    ]


def _broken_steps(guard: GuardConfig | None, curve: _Curve) -> set[int]:
    """Steps at which the guard's error rate exceeds that of the start by more than its limit."""
    if guard is None or 0 not in curve:
        return set()
    return {step for step, rate in curve.items() if rate - curve[0] > guard.max_wer_increase + _ROUNDING}


def _guard_message(guard: GuardConfig, curve: _Curve) -> str:
    increase = 100 * (curve[max(curve)] - curve[0])
    action = "the run stops" if guard.action == "stop" else "this checkpoint is not selected"
    return (
        f"the {guard.metric.upper()} of the guard `{guard.test_set}` is {increase:.2f} points above that of the start, "
        f"more than {100 * guard.max_wer_increase:g} (`evaluation.selection.guard`): {action}"
    )


def _evaluations_without_improvement(curve: _Curve, min_improvement: float) -> int:
    """Evaluations since the last one that was better than all before it by more than `min_improvement`."""
    best, waited = float("inf"), 0
    for step in sorted(curve):
        waited += 1
        if best - curve[step] > min_improvement + _ROUNDING:
            waited = 0
        best = min(best, curve[step])
    return waited

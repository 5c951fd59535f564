"""Which checkpoint is the best one by its word error rate, and when a run has seen enough."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist.config import GuardConfig, SelectionConfig
from voxtral_dist.errors import UserError
from voxtral_dist.files import write_atomically

_BEST_FILE = "best.json"
# Differences of rates are exact to this much; two rates of a set with N words differ by 1 / N at least.
_ROUNDING = 1e-9
# WER by step.
_Curve = dict[int, float]


@dataclass(frozen=True)
class Verdict:
    """What the evaluations of a run say.

    best_step: whose checkpoint is the best one; None where there is none yet, or nothing is selected. sentences: for
    the log. must_stop: whether going on makes no sense by the configuration.
    """

    best_step: int | None = None
    best_wer: float | None = None
    sentences: tuple[str, ...] = ()
    must_stop: bool = False


def judge(settings: SelectionConfig, rows: Sequence[dict[str, Any]], saved_steps: Collection[int]) -> Verdict:
    """The verdict on a run by its rows of kind `evaluation`, of which the last one of a step and a test set counts.

    What the run began with is no candidate, and neither is a checkpoint that breaks the guard, or that is not there:
    what a run removed before it was asked to select cannot be exported.
    """
    curve = {step: wer for step, wer in _curve(settings.test_set, rows).items() if step > 0}
    guard_curve = _curve(settings.guard.test_set, rows) if settings.guard else {}
    broken = _broken_steps(settings.guard, guard_curve)
    candidates = {step: wer for step, wer in curve.items() if step in saved_steps and step not in broken}
    best_step = min(candidates, key=lambda step: (candidates[step], step), default=None)
    sentences, must_stop = [], False
    if settings.guard and guard_curve and max(guard_curve) in broken:
        sentences.append(_guard_sentence(settings.guard, guard_curve))
        must_stop = settings.guard.action == "stop"
    waited = _evaluations_without_improvement(curve, settings.min_improvement)
    if settings.patience is not None and waited >= settings.patience:
        must_stop = True
        sentences.append(
            f"the WER of `{settings.test_set}` has not improved in {waited} evaluations "
            f"(`evaluation.selection.patience`): the run stops"
        )
    best_wer = None if best_step is None else candidates[best_step]
    return Verdict(best_step, best_wer, tuple(sentences), must_stop)


def refuse_guard_without_start(guard: GuardConfig, rows: Sequence[dict[str, Any]]) -> None:
    """Refuse a guard that could never act.

    Raises:
        UserError: a run that is under way did not measure the guard's test set when it began.
    """
    if 0 not in _curve(guard.test_set, rows):
        raise UserError(
            f"`evaluation.selection.guard`: the run did not measure `{guard.test_set}` when it began, so nothing tells "
            "what it forgets: remove the guard, or begin again in another `run_dir`."
        )


def write_best(run_dir: Path, verdict: Verdict) -> None:
    """Name the best checkpoint in `best.json`, which is not there where there is none."""
    if verdict.best_step is None:
        (run_dir / _BEST_FILE).unlink(missing_ok=True)
        return
    checkpoint = f"checkpoints/step-{verdict.best_step:07d}"
    best = {"step": verdict.best_step, "wer": verdict.best_wer, "checkpoint": checkpoint}
    write_atomically(run_dir / _BEST_FILE, json.dumps(best, indent=1))


def selected_step(run_dir: Path) -> int | None:
    """The step of the best checkpoint of a run; None where it selected none.

    Raises:
        UserError: the file that names it is damaged.
    """
    path = run_dir / _BEST_FILE
    if not path.is_file():
        return None
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["step"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is damaged: remove it, and evaluations tell the best step.") from error


def _curve(name: str, rows: Sequence[dict[str, Any]]) -> _Curve:
    return {row["step"]: row["wer"] for row in rows if row["name"] == name and row["wer"] is not None}


def _broken_steps(guard: GuardConfig | None, curve: _Curve) -> set[int]:
    """Steps at which the guard's WER is above what it was at the start by more than is allowed."""
    if guard is None or 0 not in curve:
        return set()
    return {step for step, wer in curve.items() if wer - curve[0] > guard.max_wer_increase + _ROUNDING}


def _guard_sentence(guard: GuardConfig, curve: _Curve) -> str:
    increase = 100 * (curve[max(curve)] - curve[0])
    action = "the run stops" if guard.action == "stop" else "this checkpoint is not taken for the best one"
    return (
        f"the WER of the guard `{guard.test_set}` is {increase:.2f} points above that of the start, more than "
        f"{100 * guard.max_wer_increase:g} (`evaluation.selection.guard`): {action}"
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

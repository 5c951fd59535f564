"""The selection of the best checkpoint during a run."""

from __future__ import annotations

from pathlib import Path

from voxtral_dist.checkpoints.directory import CheckpointDirectory
from voxtral_dist.config import SelectionConfig
from voxtral_dist.distributed.world import World
from voxtral_dist.files import write_errors_named
from voxtral_dist.training.metrics_log import MetricsLog
from voxtral_dist.training.selection import Verdict, judge, refuse_guard_without_start, write_best


class CheckpointSelector:
    """Selects the best checkpoint after every evaluation. All ranks call it together and agree."""

    def __init__(
        self,
        settings: SelectionConfig | None,
        run_dir: Path,
        checkpoints: CheckpointDirectory,
        metrics_log: MetricsLog,
        world: World,
    ) -> None:
        """Prepare the selection of a run; without settings nothing is selected."""
        self._settings = settings
        self._run_dir = run_dir
        self._checkpoints = checkpoints
        self._metrics_log = metrics_log
        self._world = world

    def select(self, step: int) -> Verdict:
        """Judge all evaluations until this step, and keep and name the best checkpoint.

        The verdict is the same after a restart.

        Raises:
            UserError: a resumed run has a guard that it did not measure at its start.
        """
        # Without a selection an earlier `best.json` may name a removed checkpoint, and goes.
        verdict = Verdict() if self._settings is None else self._judge(self._settings, step)
        self._checkpoints.kept_step = verdict.best_step
        if self._world.is_first:
            with write_errors_named("The selected checkpoint", self._run_dir):
                write_best(self._run_dir, verdict)
        return verdict

    def _judge(self, settings: SelectionConfig, step: int) -> Verdict:
        evaluations = self._metrics_log.rows("evaluation")
        if settings.guard is not None:
            refuse_guard_without_start(settings.guard, evaluations)
        verdict = judge(settings, evaluations, self._checkpoints.intact_steps())
        recorded = self._metrics_log.rows("selection")
        for message in verdict.messages:
            self._metrics_log.say(f"step {step}: {message}")
            event = {"event": "selection", "sentence": message}
            # A resumed run has recorded it before.
            if {"kind": "event", "step": step, **event} not in recorded:
                self._metrics_log.write("event", step, event)
        return verdict

"""The test sets of a run, measured when it is time, and what their error rates say about going on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.collectives import from_first_rank
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine
from voxtral_dist.evaluation.batch_decoder import BatchDecoder
from voxtral_dist.evaluation.decoding_weights import decoding_bytes, decoding_weights
from voxtral_dist.evaluation.test_sets import TestSet, evaluate_test_set
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.voxtral import DTYPES, read_voxtral_config
from voxtral_dist.scoring.normalizer import normalizer
from voxtral_dist.training.metrics import MetricsLog, read_metrics
from voxtral_dist.training.selection import Verdict, judge, refuse_guard_without_start, write_best


class Evaluator:
    """Measures all test sets with the engine's current weights. All ranks call its methods together."""

    def __init__(
        self, config: RunConfig, prompts: VoxtralPrompts, log_mel: LogMel, test_sets: Sequence[TestSet], world: World
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._log_mel = log_mel
        self._test_sets = test_sets
        self._normalizer = normalizer(config.evaluation.normalizer, config.train_data.target_text)
        self._world = world

    def is_due(self, step: int) -> bool:
        """Whether the configuration asks for an evaluation after so many steps."""
        settings = self._config.evaluation
        if step in (0, self._config.num_steps):
            return settings.at_start or step > 0
        return settings.every_steps is not None and step % settings.every_steps == 0

    def is_owed(self, step: int) -> bool:
        """Whether the state that a run starts with is due and was not measured, as by a run killed after its save."""
        wanted = {test_set.name for test_set in self._test_sets}
        return self.is_due(step) and not self._measured_at(step).issuperset(wanted)

    def evaluate(self, engine: Engine, step: int, log: MetricsLog) -> None:
        """Measure every test set that was not measured at this step, and record what was found."""
        done = self._measured_at(step)
        test_sets = [test_set for test_set in self._test_sets if test_set.name not in done]
        if not test_sets:
            return
        settings = self._config.evaluation
        out_dir = self._config.run_dir / "evaluations" / f"step-{step:07d}"
        with decoding_weights(engine, settings, self._decoding_bytes(), self._world) as (model, in_lockstep, why):
            log.say(f"step {step}: {why}")
            decoder = BatchDecoder(model, self._prompts, self._log_mel, settings, in_lockstep)
            for test_set in test_sets:
                score = evaluate_test_set(test_set, decoder, settings, self._normalizer, out_dir, self._world)
                log.write("evaluation", step, {"name": test_set.name} | score.figures())
                log.say(f"step {step}: {test_set.name}: {score}")

    def verdict(self, saved_steps: Callable[[], Collection[int]], step: int, log: MetricsLog) -> Verdict:
        """What all evaluations so far say, the same on all ranks and after a restart; said and recorded.

        Args:
            saved_steps: gives those whose checkpoints are there, where it matters.
            step: of the last evaluation, or that the run goes on from.
            log: of the run.

        Raises:
            UserError: the run goes on with a guard that it did not measure when it began.
        """
        settings = self._config.evaluation.selection
        if settings is None:
            # What an earlier configuration selected may be gone.
            return self._written(Verdict())
        recorded = self._recorded()
        if settings.guard is not None:
            refuse_guard_without_start(settings.guard, recorded)
        verdict = judge(settings, recorded, saved_steps())
        for sentence in verdict.sentences:
            log.say(f"step {step}: {sentence}")
            event = {"event": "selection", "sentence": sentence}
            # A run that goes on from here has said it before.
            if {"kind": "event", "step": step, **event} not in self._rows("event"):
                log.write("event", step, event)
        return self._written(verdict)

    def _written(self, verdict: Verdict) -> Verdict:
        if self._world.is_first:
            write_best(self._config.run_dir, verdict)
        return verdict

    def _measured_at(self, step: int) -> set[str]:
        return {row["name"] for row in self._recorded() if row["step"] == step}

    def _recorded(self) -> list[dict[str, Any]]:
        return from_first_rank(self._rows("evaluation"), self._world)

    def _rows(self, kind: str) -> list[dict[str, Any]]:
        """Those of a kind; none on other ranks than the first."""
        rows = read_metrics(self._config.run_dir / "metrics.jsonl") if self._world.is_first else []
        return [row for row in rows if row["kind"] == kind]

    def _decoding_bytes(self) -> int:
        model = self._config.model
        return decoding_bytes(
            read_voxtral_config(model.path),
            max(test_set.most_positions for test_set in self._test_sets),
            self._config.evaluation.num_beams,
            model.encoder_windows_per_chunk,
            DTYPES[model.precision],
        )

"""The evaluations of a training run: when they are due, and the test sets decoded with the engine's weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.distributed.standing import stand
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.engine import Engine
from voxtral_dist.evaluation.batch_decoder import BatchDecoder
from voxtral_dist.evaluation.decoding import EvaluationStoppedError
from voxtral_dist.evaluation.decoding_weights import decoding_weights, shown_weights
from voxtral_dist.evaluation.evaluating import evaluate_test_set
from voxtral_dist.evaluation.test_set import TestSet
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.output.console import one_line
from voxtral_dist.scoring.normalizer import Normalizer
from voxtral_dist.scoring.result_files import result_files
from voxtral_dist.text.json_text import parse_json
from voxtral_dist.training.metrics_log import MetricsLog

_SAMPLE_CHARACTERS = 100


@dataclass(frozen=True)
class Evaluator:
    """Measures all test sets with the engine's current weights. All ranks call its methods together.

    num_steps: updates of the whole run, after which an evaluation is always due.
    decoding_bytes: memory that decoding takes on a rank beside gathered weights.
    out_dir: where results are written, in a folder for each step.
    """

    settings: EvaluationConfig
    num_steps: int
    engine: Engine
    prompts: VoxtralPrompts
    log_mel: LogMel
    normalizer: Normalizer
    test_sets: Sequence[TestSet]
    decoding_bytes: int
    out_dir: Path
    metrics_log: MetricsLog
    world: World

    def is_due(self, step: int) -> bool:
        """Whether the configuration asks for an evaluation after this many updates."""
        if step in (0, self.num_steps):
            return self.settings.at_start or step > 0
        return self.settings.every_steps is not None and step % self.settings.every_steps == 0

    def is_owed(self, step: int) -> bool:
        """Whether a resumed run still has to evaluate this step: it was killed between saving and evaluating."""
        return self.is_due(step) and bool(self._not_measured(step))

    def evaluate(self, step: int, must_stop: Callable[[], bool] = lambda: False) -> bool:
        """Measure every test set that was not measured at this step, and record the results.

        Args:
            step: the number of updates so far.
            must_stop: whether this rank is asked to stop; all ranks then stop before their next batch.

        Returns:
            Whether all were measured; false on all ranks where one was asked to stop. The run begins with the others
            when it resumes.
        """
        try:
            self._evaluate(step, must_stop)
        except EvaluationStoppedError:
            return False
        return True

    def _evaluate(self, step: int, must_stop: Callable[[], bool]) -> None:
        test_sets = self._not_measured(step)
        if not test_sets:
            return
        stand("evaluation", step)
        out_dir = self.out_dir / f"step-{step:07d}"
        with (
            shown_weights(self.engine, self.settings),
            decoding_weights(self.engine, self.settings, self.decoding_bytes, self.world) as (model, in_lockstep, why),
        ):
            self.metrics_log.say(f"step {step}: {why}")
            decoder = BatchDecoder(model, self.prompts, self.log_mel, self.settings, in_lockstep)
            for test_set in test_sets:
                started = time.monotonic()
                result = evaluate_test_set(
                    test_set, decoder, self.settings, self.normalizer, out_dir, self.world, must_stop
                )
                seconds = {"seconds": round(time.monotonic() - started, 3)}
                self.metrics_log.write("evaluation", step, {"name": test_set.name} | result.metrics() | seconds)
                self.metrics_log.say(f"step {step}: {test_set.name}: {result}")
                if self.world.is_first and test_set is self.test_sets[0]:
                    self._say_sample(out_dir / result_files(test_set.name)[0])

    def _say_sample(self, hypotheses: Path) -> None:
        """Print what was decoded of the first utterance with a text, of the same one each time."""
        with hypotheses.open("rb") as lines:
            row = next((row for row in map(parse_json, lines) if row["reference"].strip()), None)
        if row is not None:
            for what in ("reference", "hypothesis"):
                self.metrics_log.say(f"  {what:<12}{_beginning(row[what])}")

    def _not_measured(self, step: int) -> list[TestSet]:
        measured = {row["name"] for row in self.metrics_log.rows("evaluation") if row["step"] == step}
        return [test_set for test_set in self.test_sets if test_set.name not in measured]


def _beginning(text: str) -> str:
    shown = one_line(text)
    return shown if len(shown) <= _SAMPLE_CHARACTERS else f"{shown[:_SAMPLE_CHARACTERS]}…"

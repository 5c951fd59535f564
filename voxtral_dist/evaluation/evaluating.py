"""Evaluation of a test set over all ranks: decoded, gathered, checked for completeness, scored and written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from voxtral_dist.config import EvaluationConfig
from voxtral_dist.data.examples.example import Example
from voxtral_dist.distributed.collectives import computed_on_first, gather_on_first, max_over_ranks
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import RankError
from voxtral_dist.evaluation.batch_decoder import BatchDecoder, Hypothesis
from voxtral_dist.evaluation.decoding import Decoded, decode_batches
from voxtral_dist.evaluation.test_set import TestSet
from voxtral_dist.files import write_errors_named
from voxtral_dist.output.counting import counted
from voxtral_dist.scoring.normalizer import Normalizer
from voxtral_dist.scoring.result_files import write_results
from voxtral_dist.scoring.results import Measurements, TestSetResult, score_test_set
from voxtral_dist.scoring.utterances import DecodedUtterance, ScoredUtterance, score_utterance


def evaluate_test_set(
    test_set: TestSet,
    decoder: BatchDecoder,
    settings: EvaluationConfig,
    normalizer: Normalizer,
    out_dir: Path,
    world: World,
    must_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int], None] = lambda _: None,
) -> TestSetResult:
    """Decode every utterance once over all ranks and write the results; every rank gets the result.

    `must_stop` and `on_progress` are those of `decode_batches`.

    Raises:
        EvaluationStoppedError: `must_stop` was true on a rank before one of its batches; nothing is written.
        SharedError: an utterance of the test set is unusable, or a rank could not decode it.
        ReadError: the storage of its shards fails.
        RankError: on rank 0, if utterances are missing.
        WriteError: on rank 0, if the results cannot be written.
    """
    if test_set.has_answers:
        # The steps of target text apply to transcripts only.
        normalizer = replace(normalizer, target_text=())
    decoded = decode_batches(
        test_set.name, test_set.batches, test_set.read, decoder, settings.measures_loss, world, must_stop, on_progress
    )
    measured = measured_over_ranks(decoded, world)
    mine = [score_utterance(_utterance(test_set, *pair), normalizer, test_set.words) for pair in decoded.pairs]
    gathered = gather_on_first(mine, world)

    def score() -> TestSetResult:
        utterances = check_complete(test_set, [utterance for part in gathered for utterance in part])
        test_set.grouping.warn_of_unknown(test_set.name, (utterance.decoded for utterance in utterances))
        result = score_test_set(utterances, normalizer, test_set.num_distractors, test_set.grouping, measured)
        with write_errors_named(f"The results of `{test_set.name}`", out_dir):
            write_results(out_dir, test_set.name, utterances, result)
        return result

    return computed_on_first(score, world)


def check_complete(test_set: TestSet, utterances: Sequence[ScoredUtterance]) -> list[ScoredUtterance]:
    """Sort the utterances in the order of the index, after checking that each is there exactly once.

    Raises:
        RankError: an utterance is missing, repeated or unknown, so that its error rate would be wrong.
    """
    counts = Counter(utterance.decoded.utterance_id for utterance in utterances)
    unknown = [utterance_id for utterance_id in counts if not 0 <= utterance_id < len(test_set.index)]
    missing = [utterance_id for utterance_id in range(len(test_set.index)) if utterance_id not in counts]
    repeated = [utterance_id for utterance_id, count in counts.items() if count > 1]
    if missing or repeated or unknown:
        raise RankError(
            f"The evaluation of `{test_set.name}` lost {counted(len(missing), 'utterance')} (first: {missing[:3]}), "
            f"decoded {len(repeated)} twice (first: {repeated[:3]}) and {len(unknown)} that it does not have (first: "
            f"{unknown[:3]}): no result is written, because its word error rate would be wrong."
        )
    return sorted(utterances, key=lambda utterance: utterance.decoded.utterance_id)


def measured_over_ranks(decoded: Decoded, world: World) -> Measurements:
    """The time of the slowest rank; on rank 0, the mean loss over the target tokens of all ranks, too."""
    milliseconds = max_over_ranks([round(1000 * decoded.seconds)], world)[0]
    gathered = gather_on_first((decoded.losses, decoded.num_target_tokens), world)
    # Rounded once: batches come to ranks in any order.
    loss_sum = math.fsum(loss for losses, _ in gathered for loss in losses)
    num_target_tokens = sum(number for _, number in gathered)
    return Measurements(milliseconds / 1000, loss_sum / num_target_tokens if num_target_tokens else None)


def _utterance(test_set: TestSet, example: Example, hypothesis: Hypothesis) -> DecodedUtterance:
    return DecodedUtterance(
        utterance_id=example.utterance_id,
        key=example.key,
        language=test_set.index.language(example.utterance_id),
        duration_seconds=round(example.duration_seconds, 4),
        reference=example.reference,
        hypothesis=hypothesis.text,
        hit_limit=hypothesis.hit_limit,
        detected_language=hypothesis.detected_language,
        asks_for_language=example.is_transcription and example.is_untagged,
        context=example.context,
        fields=example.fields,
    )

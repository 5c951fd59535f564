"""The sizes of micro-batches and decoded batches: from the shards if they are found, else from the budgets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from voxtral_dist.config import MIN_NEW_TOKENS, RunConfig, TrainDataConfig
from voxtral_dist.data.plan.example_sizes import ExampleSizes, text_tokens
from voxtral_dist.data.plan.slot_examples import SlotExamples
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.training_set import TrainingSet, build_training_set
from voxtral_dist.errors import UserError
from voxtral_dist.estimate.activations import MicroBatchShape
from voxtral_dist.evaluation.building import build_test_sets
from voxtral_dist.evaluation.decoding_memory import DecodingShape
from voxtral_dist.evaluation.test_set import TestSet
from voxtral_dist.model.encoder import num_chunks
from voxtral_dist.model.flops import BatchShape
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.published import prompts_for_estimates
from voxtral_dist.output.counting import counted

# Tokens of a prompt besides its audio, without a tokenizer to count them: markers and the language tag.
_PROMPT_TOKENS = 10
# Target tokens of 30 s of speech, where no transcripts are at hand.
_TARGET_TOKENS_PER_SECOND = 2
# Micro-batches of the plan that are looked at, which takes some seconds.
_PROBED_MICRO_BATCHES = 1000


@dataclass(frozen=True)
class WindowSizes:
    """Seconds and audio tokens of a window of the encoder, and positions of the language model."""

    seconds: float
    audio_tokens: int
    max_positions: int


@dataclass(frozen=True)
class DataStatistics:
    """Statistics of the training data.

    hours_per_epoch: audio of one epoch. num_utterances: after the filters. num_steps, num_epochs: of the whole run.
    target_tokens: per step. padding: fraction of positions that are padding. window_fill: fraction of the windows that
    is audio.
    """

    hours_per_epoch: float
    num_utterances: int
    steps_per_epoch: int
    num_steps: int
    num_epochs: float
    target_tokens: float
    padding: float
    window_fill: float


@dataclass(frozen=True)
class EvaluationBatches:
    """The sizes of the batches that evaluations decode; none without test sets.

    source: how they were found. audio_seconds: of all sets, each once for each of its lists of words; None if unknown.
    """

    shapes: tuple[DecodingShape, ...] = ()
    source: str = ""
    audio_seconds: float | None = None


@dataclass(frozen=True)
class Workload:
    """The micro-batches of a run, and the batches of its evaluations.

    candidates: the micro-batch that needs most memory is among them. typical: the mean micro-batch. needed,
    computed: sums over `num_averaged` micro-batches, for FLOPs. source: how they were found. data: None where shards or
    tokenizer are missing; then `missing` says which. probed: the micro-batches that were looked at; none without
    shards.
    """

    candidates: tuple[MicroBatchShape, ...]
    typical: MicroBatchShape
    needed: BatchShape
    computed: BatchShape
    num_averaged: int
    source: str
    data: DataStatistics | None = None
    missing: str = ""
    evaluation: EvaluationBatches = field(default_factory=EvaluationBatches)
    probed: tuple[MicroBatchShape, ...] = ()


def find_workload(config: RunConfig, sizes: WindowSizes) -> Workload:
    """The workload from the shards if they and the tokenizer are found, else from the budgets."""
    evaluation = find_evaluation_batches(config, sizes)
    return replace(_training_workload(config, sizes), evaluation=evaluation)


def find_evaluation_batches(config: RunConfig, sizes: WindowSizes) -> EvaluationBatches:
    """The batches of the test sets as evaluations make them; `batch_size` full windows each if a set is not found."""
    settings = config.evaluation
    if not settings.test_sets:
        return EvaluationBatches()
    try:
        prompts = prompts_for_estimates(config.model.path, config.model.max_positions)
        test_sets = build_test_sets(settings, prompts, config.train_data.target_text, Storage(config.storage))
    except UserError:
        return largest_evaluation_batches(config, sizes)
    shapes = dict.fromkeys(shape for test_set in test_sets for shape in test_set.decoding_shapes)
    seconds = sum(_audio_seconds(test_set) for test_set in test_sets)
    return EvaluationBatches(tuple(shapes), "the largest batch of the test sets", seconds)


def _audio_seconds(test_set: TestSet) -> float:
    ids = np.array([utterance for batch in test_set.batches for utterance in batch], dtype=np.int64)
    return float(test_set.index.gather(ids)["duration_ms"].astype(np.int64).sum()) / 1000


def largest_evaluation_batches(config: RunConfig, sizes: WindowSizes) -> EvaluationBatches:
    """Batches of `batch_size` clips that fill a window, whatever test sets hold."""
    settings = config.evaluation
    answer = MIN_NEW_TOKENS + math.ceil(settings.max_tokens_per_second * sizes.seconds)
    prompt = sizes.audio_tokens + _PROMPT_TOKENS
    shape = DecodingShape(settings.batch_size, settings.batch_size, prompt, answer, answer)
    return EvaluationBatches(
        (shape,), f"assumed batches of {counted(settings.batch_size, 'clip')} of {sizes.seconds:g} s"
    )


def _training_workload(config: RunConfig, sizes: WindowSizes) -> Workload:
    try:
        prompts = prompts_for_estimates(config.model.path, config.model.max_positions)
        training_set = build_training_set(config.train_data, prompts, config.seed, Storage(config.storage))
    except UserError as error:
        return _by_budgets(config, sizes, str(error))
    return _by_plan(config, training_set, prompts)


def largest_workload(config: RunConfig, sizes: WindowSizes) -> Workload:
    """The workload from the budgets alone, whatever the shards hold; without evaluations."""
    return _by_budgets(config, sizes, missing="not looked for")


def _by_budgets(config: RunConfig, sizes: WindowSizes, missing: str) -> Workload:
    """The largest micro-batch for memory; for time and FLOPs as many clips with transcripts of usual length."""
    largest = largest_within(config.train_data, sizes)
    typical = clips(largest.num_examples, sizes, -(-largest.num_windows // largest.num_examples))
    return Workload(
        candidates=(largest,),
        typical=typical,
        needed=BatchShape.needed(
            typical.num_windows, [typical.num_positions] * typical.num_examples, typical.num_target_tokens
        ),
        computed=computed_shape(typical, config.model.encoder_windows_per_chunk),
        num_averaged=1,
        source="the largest that the budgets of `train_data` allow",
        missing=missing,
    )


def clips(num_examples: int, sizes: WindowSizes, windows_each: int = 1) -> MicroBatchShape:
    """A micro-batch of equal clips that fill their windows, with transcripts of usual length: 60 tokens in 30 s."""
    targets = max(1, round(_TARGET_TOKENS_PER_SECOND * sizes.seconds * windows_each))
    positions = windows_each * sizes.audio_tokens + _PROMPT_TOKENS + targets
    return MicroBatchShape(num_examples * windows_each, num_examples, positions, num_examples * targets)


def largest_within(config: TrainDataConfig, sizes: WindowSizes) -> MicroBatchShape:
    """The largest micro-batch that the budgets allow: as many examples as possible, each with the longest target.

    Without `max_duration_seconds` and `max_windows`, examples are assumed to be one window long.
    """
    prompt = _PROMPT_TOKENS + (config.context.max_tokens if config.context else 0)
    smallest = sizes.audio_tokens + prompt + 1
    limits = [config.max_examples, config.max_windows, config.max_tokens and config.max_tokens // smallest]
    examples = max(1, min(limit for limit in limits if limit is not None))
    windows_each = config.max_windows or 1
    if config.max_duration_seconds is not None:
        windows_each = max(1, math.ceil(config.max_duration_seconds / sizes.seconds))
    windows = min(config.max_windows or examples * windows_each, examples * windows_each)
    positions = -(-windows // examples) * sizes.audio_tokens + prompt + config.max_target_tokens
    positions = min(positions, sizes.max_positions)
    if config.max_tokens is not None:
        positions = max(smallest, min(positions, config.max_tokens // examples))
        windows = min(windows, examples * ((positions - prompt - 1) // sizes.audio_tokens))
    targets = examples * (positions - prompt + 1) - windows * sizes.audio_tokens
    return MicroBatchShape(windows, examples, positions, min(targets, examples * (config.max_target_tokens + 1)))


def _by_plan(config: RunConfig, training_set: TrainingSet, prompts: VoxtralPrompts) -> Workload:
    context = config.train_data.context
    sizes = ExampleSizes.of(prompts, context.max_tokens if context else 0)
    num_steps = config.total_steps(training_set.plan.steps_per_epoch)
    found = [_micro_batch(slot, training_set, sizes) for slot in _slots(num_steps, training_set)]
    shapes = [shape for shape, _ in found]
    per_chunk = config.model.encoder_windows_per_chunk
    needed = sum((positions for _, positions in found), BatchShape())
    computed = sum((computed_shape(shape, per_chunk) for shape in shapes), BatchShape())
    largest = {
        max(shapes, key=lambda shape: shape.num_windows),
        max(shapes, key=lambda shape: shape.num_examples * shape.num_positions),
        max(shapes, key=lambda shape: shape.num_target_tokens),
    }
    real = sum(positions.num_positions for _, positions in found)
    slots_per_epoch = training_set.plan.steps_per_epoch * config.train_data.slots_per_step
    plan_statistics = training_set.plan.statistics
    windows_per_epoch = sum(shape.num_windows for shape in shapes) / len(shapes) * slots_per_epoch
    statistics = DataStatistics(
        hours_per_epoch=windows_per_epoch * prompts.window_seconds * plan_statistics.window_fill / 3600,
        num_utterances=sum(stream.num_utterances for stream in training_set.streams.streams),
        steps_per_epoch=training_set.plan.steps_per_epoch,
        num_steps=num_steps,
        num_epochs=num_steps / training_set.plan.steps_per_epoch,
        target_tokens=sum(shape.num_target_tokens for shape in shapes) / len(shapes) * config.train_data.slots_per_step,
        padding=1 - real / max(1, sum(shape.num_examples * shape.num_positions for shape in shapes)),
        window_fill=plan_statistics.window_fill,
    )
    source = (
        f"the largest of the first {counted(len(shapes), 'micro-batch', plural='micro-batches')} of the training data"
    )
    mean = _mean(shapes)
    return Workload(tuple(largest), mean, needed, computed, len(shapes), source, statistics, probed=tuple(shapes))


def _mean(shapes: Sequence[MicroBatchShape]) -> MicroBatchShape:
    def mean(values: Iterable[int]) -> int:
        return max(1, round(sum(values) / len(shapes)))

    return MicroBatchShape(
        num_windows=mean(shape.num_windows for shape in shapes),
        num_examples=mean(shape.num_examples for shape in shapes),
        num_positions=mean(shape.num_positions for shape in shapes),
        num_target_tokens=mean(shape.num_target_tokens for shape in shapes),
    )


def computed_shape(shape: MicroBatchShape, windows_per_chunk: int) -> BatchShape:
    """The shape of a micro-batch for hardware FLOPs, with its chunks of the encoder."""
    return BatchShape.computed(
        shape.num_windows,
        shape.num_examples,
        shape.num_positions,
        shape.num_target_tokens,
        num_chunks(shape.num_windows, windows_per_chunk),
    )


def _slots(num_steps: int, training_set: TrainingSet) -> Iterator[SlotExamples]:
    plan, num_probed = training_set.plan, 0
    for step in range(num_steps):
        for slot in range(plan.num_slots(step)):
            examples = plan.slot(step, slot)
            if examples.utterance_ids:
                yield examples
                num_probed += 1
        if num_probed >= _PROBED_MICRO_BATCHES:
            return


def _micro_batch(
    slot: SlotExamples, training_set: TrainingSet, sizes: ExampleSizes
) -> tuple[MicroBatchShape, BatchShape]:
    """The shape of a micro-batch as it is computed, with padding, and what the mathematics needs of it."""
    records = training_set.index.gather(np.array(slot.utterance_ids, dtype=np.int64))
    firsts = np.cumsum([0, *slot.example_sizes[:-1]])
    windows = sizes.windows(np.add.reduceat(records["duration_ms"].astype(np.int64), firsts))
    tokens = np.add.reduceat(text_tokens(records), firsts)
    positions = sizes.positions(windows, tokens)
    # A target more than text tokens: `</s>`.
    targets = int(records["num_text_tokens"].astype(np.int64).sum()) + len(firsts)
    shape = MicroBatchShape(int(windows.sum()), len(firsts), int(positions.max()), targets)
    return shape, BatchShape.needed(int(windows.sum()), positions.tolist(), targets)

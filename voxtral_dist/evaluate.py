"""Evaluation of a model on shard folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from voxtral_dist.config import EvaluationConfig, TestContextConfig, TestSetConfig, TextStep
from voxtral_dist.data.stored.index import sets_by_name
from voxtral_dist.distributed.world import World, joined_world
from voxtral_dist.evaluation.batch_decoder import load_decoder, load_prompts
from voxtral_dist.evaluation.building import build_test_sets, refuse_different_test_sets
from voxtral_dist.evaluation.evaluating import evaluate_test_set
from voxtral_dist.evaluation.test_set import TestSet
from voxtral_dist.files import refuse_unwritable
from voxtral_dist.progress import progress_of_command
from voxtral_dist.scoring.normalizer import normalizer
from voxtral_dist.scoring.result_files import refuse_to_replace_others, result_files
from voxtral_dist.scoring.results import TestSetResult
from voxtral_dist.text.word_list import WordList


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of decoding and scoring shard folders; see `TestSetConfig` and `TrainDataConfig.target_text`."""

    settings: EvaluationConfig = field(default_factory=EvaluationConfig)
    detect_language: bool = False
    context: TestContextConfig | None = None
    target_text: tuple[TextStep, ...] = ()


def evaluate_model(
    model_path: str,
    *shards: str,
    out_dir: Path = Path("evaluation"),
    options: EvaluationOptions | None = None,
    precision: str = "auto",
) -> dict[str, TestSetResult]:
    """Decode and score shard folders, on all ranks that a launcher started or in this process alone.

    Args:
        model_path: a Hugging Face folder or hub name, or a checkpoint of a run.
        shards: folders made by `voxtral-dist shards pack`.
        out_dir: folder for `NAME.json` and `NAME.jsonl`, by the names of the shard folders.
        options: options of decoding and scoring.
        precision: `float32`, `bfloat16`, `float16`, or `auto` for that of the stored weights.

    Returns:
        A result for each shard folder, by its name.

    Raises:
        UserError: see `evaluate`.

    Example:
        >>> from voxtral_dist import evaluate_model
        >>> results = evaluate_model("models/tiny", "shards/speech")
        >>> results["speech"].normalized.num_utterances
        8
        >>> results["speech"].normalized.wer >= 0.5  # of a model with random weights
        True
    """
    with joined_world() as world:
        return dict(evaluate(model_path, shards, options or EvaluationOptions(), precision, out_dir, world))


def evaluate(
    model_path: str, shards: Sequence[str], options: EvaluationOptions, precision: str, out_dir: Path, world: World
) -> Iterator[tuple[str, TestSetResult]]:
    """Decode and score shard folders in turn, and write their results to `out_dir`. All ranks call it together.

    Yields:
        The name and result of each folder.

    Raises:
        UserError: two folders have the same name, which is also that of their results, or `out_dir` cannot be written
            or holds other files of these names.
    """
    if options.context is not None:
        # Reports a bad file as a mistake in `--words`, not in a test set.
        WordList.read(options.context.words, "--words")
    test_sets = {
        name: TestSetConfig(shards=folder, detect_language=options.detect_language, context=options.context)
        for name, folder in sets_by_name(shards).items()
    }
    named = options.settings.model_copy(update={"test_sets": test_sets})
    prompts = load_prompts(model_path)
    built = build_test_sets(named, prompts, options.target_text)
    for test_set in built:
        refuse_to_replace_others("--out", out_dir, test_set.name)
    refuse_unwritable("--out", out_dir, [file for test_set in built for file in result_files(test_set.name)])
    refuse_different_test_sets(built, world)
    # Before the model is loaded, because an unusable normalizer is an error.
    used = normalizer(named.normalizer, options.target_text)
    decoder = load_decoder(model_path, prompts, named, precision, world)
    for test_set in built:
        with _progress(test_set, world) as on_progress:
            result = evaluate_test_set(test_set, decoder, named, used, out_dir, world, on_progress=on_progress)
        yield test_set.name, result


@contextmanager
def _progress(test_set: TestSet, world: World) -> Iterator[Callable[[int], None]]:
    """What shows how many utterances are decoded, on the first rank."""
    if not world.is_first:
        yield lambda _: None
        return
    with progress_of_command(f"evaluate {test_set.name}", len(test_set.index)) as display:
        yield display.show

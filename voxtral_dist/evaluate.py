"""The word error rate of one model on shard folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from voxtral_dist.config import EvaluationConfig, TestContextConfig, TestSetConfig, TextStep
from voxtral_dist.data.stored.storage import is_remote
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError
from voxtral_dist.evaluation.loading import load_decoder, processor_path
from voxtral_dist.evaluation.test_sets import build_test_sets, evaluate_test_set, refuse_different_test_sets
from voxtral_dist.files import refuse_unwritable
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.scoring.normalizer import normalizer
from voxtral_dist.scoring.results import TestSetScore, refuse_to_replace_others, result_files
from voxtral_dist.text.word_list import WordList


@dataclass(frozen=True)
class EvaluationOptions:
    """How shard folders are decoded and scored; see `TestSetConfig` and `TrainDataConfig.target_text`."""

    settings: EvaluationConfig = field(default_factory=EvaluationConfig)
    detect_language: bool = False
    context: TestContextConfig | None = None
    target_text: tuple[TextStep, ...] = ()


def evaluate(
    model_path: str, shards: Sequence[str], options: EvaluationOptions, precision: str, out_dir: Path, world: World
) -> Iterator[tuple[str, TestSetScore]]:
    """Name and score of each shard folder in turn; details are written to `out_dir`.

    Raises:
        UserError: two folders have the same name, so that the results of one would replace the other's, or `out_dir`
            cannot be written, or holds other files of their names.
    """
    if options.context is not None:
        # A mistake in it is one of the option, and of no test set.
        WordList.read(options.context.words, "--words")
    test_sets = {
        _set_name(folder): TestSetConfig(
            shards=folder, detect_language=options.detect_language, context=options.context
        )
        for folder in shards
    }
    if len(test_sets) < len(shards):
        raise UserError("Two of the shard folders have the same name, which names their results: evaluate them apart.")
    named = options.settings.model_copy(update={"test_sets": test_sets})
    prompts = VoxtralPrompts.from_pretrained(processor_path(model_path))
    built = build_test_sets(named, prompts, options.target_text)
    for test_set in built:
        refuse_to_replace_others("--out", out_dir, test_set.name)
    refuse_unwritable("--out", out_dir, [file for test_set in built for file in result_files(test_set.name)])
    refuse_different_test_sets(built, world)
    # Before the model is loaded: it may be refused.
    used = normalizer(named.normalizer, options.target_text)
    decoder = load_decoder(model_path, prompts, named, precision, world)
    for test_set in built:
        yield test_set.name, evaluate_test_set(test_set, decoder, named, used, out_dir, world)


def _set_name(shards: str) -> str:
    """The last part of a folder or URL."""
    return shards.rstrip("/").rpartition("/")[2] if is_remote(shards) else Path(shards).resolve().name

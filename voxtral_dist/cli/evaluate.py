"""`voxtral-dist evaluate`."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from voxtral_dist.cli.arguments import (
    Commands,
    add_decoding,
    add_scoring,
    count,
    decoding_settings,
    examples,
    positive,
    positive_number,
)
from voxtral_dist.config import EvaluationConfig, TestContextConfig
from voxtral_dist.distributed.launchers import is_on_several_hosts
from voxtral_dist.errors import UserError
from voxtral_dist.model.folders import refuse_unknown_name, refuse_wrong_model
from voxtral_dist.output.console import say

if TYPE_CHECKING:
    from voxtral_dist.evaluate import EvaluationOptions

_DECIDED_BY_SERVER = "does nothing with `--server`, which decodes as it was started: remove it."
_NO_LISTS = (
    "needs the model itself: servers put no lists of words into Voxtral's prompts. `voxtral-dist score --words` "
    "measures the B-WER of a served model's results."
)
# Options that have no effect on a server, and why.
_LOCAL_OPTIONS = {
    "words": _NO_LISTS,
    "distractors": _NO_LISTS,
    **dict.fromkeys(
        ("precision", "batch_size", "max_windows", "beams", "static_cache", "ema", "no_loss"), _DECIDED_BY_SERVER
    ),
}
_SERVER_OPTIONS = dict.fromkeys(("concurrency", "retry_seconds", "no_token_limit"), "needs `--server`.")


def add_evaluate(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="measure the word error rate of a model on shard folders",
        epilog=examples(
            "voxtral-dist evaluate runs/first/export shards/test --out evaluation/first",
            "voxtral-dist evaluate mistralai/Voxtral-Mini-3B-2507 shards/de shards/fr --normalizer basic",
            "voxtral-dist evaluate runs/first shards/test --server http://localhost:8000",
        ),
    )
    add_decoding(parser, served="; with --server, its name there")
    parser.add_argument("shards", nargs="+", help="folders of shards with an index")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("evaluation"),
        help="folder for results: NAME.json and NAME.jsonl per test set (default: %(default)s)",
    )
    parser.add_argument("--no-loss", action="store_true", help="do not measure the loss of the references")
    add_scoring(parser)
    parser.add_argument(
        "--detect-language",
        action="store_true",
        help="omit the language from the prompt; report detection accuracy",
    )
    parser.add_argument(
        "--words",
        type=Path,
        metavar="FILE",
        help="listed words, one per line: also decode with contexts, and report B-WER and U-WER",
    )
    parser.add_argument(
        "--distractors",
        type=count,
        nargs="+",
        metavar="N",
        help="numbers of distractors (listed words that are not in the reference) in a context; the test set is "
        "decoded once for each number (default: 0 100)",
    )
    _add_server(parser)
    parser.set_defaults(run=partial(_run, parser))


def _add_server(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group(
        "server",
        "Measure a served model, such as vLLM's, by its OpenAI-compatible route for transcriptions. An API key is "
        "taken from the environment variable VLLM_API_KEY.",
    )
    server.add_argument("--server", metavar="URL", help="such as http://localhost:8000")
    server.add_argument(
        "--concurrency", type=positive, default=32, metavar="N", help="requests in flight (default: %(default)s)"
    )
    server.add_argument(
        "--retry-seconds",
        type=positive_number,
        default=300.0,
        metavar="NUMBER",
        help="end when the server has answered nothing for this long; rerun to resume (default: %(default)g)",
    )
    server.add_argument(
        "--no-token-limit",
        action="store_true",
        help="do not send `max_completion_tokens`, which vLLM knows and other servers may refuse",
    )


def _run(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> int:
    from voxtral_dist.data.stored.index_files import refuse_missing_sets
    from voxtral_dist.text.word_list import WordList

    unusable = _SERVER_OPTIONS if parsed.server is None else _LOCAL_OPTIONS
    for name, reason in unusable.items():
        if getattr(parsed, name) != parser.get_default(name):
            raise UserError(f"`--{name.replace('_', '-')}` {reason}")
    if not is_on_several_hosts():
        if parsed.server is None:
            refuse_wrong_model(parsed.model, "MODEL", takes_checkpoints=True)
        if parsed.words is not None:
            WordList.read(parsed.words, "--words")
        refuse_missing_sets(parsed.shards)
        if parsed.server is None:
            refuse_unknown_name(parsed.model, "MODEL")
    return _evaluate(parsed) if parsed.server is None else _evaluate_server(parsed)


def _evaluate_server(parsed: argparse.Namespace) -> int:
    from voxtral_dist.serving.evaluating import ServedModel, ServedOptions, evaluate_server

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("`--server` needs one process: start it without a launcher, and raise `--concurrency`.")
    model = ServedModel(
        url=parsed.server,
        name=parsed.model,
        concurrency=parsed.concurrency,
        retry_seconds=parsed.retry_seconds,
        sends_token_limit=not parsed.no_token_limit,
        api_key=os.environ.get("VLLM_API_KEY") or None,
    )
    options = ServedOptions(_settings(parsed), parsed.detect_language, tuple(parsed.target_text))
    for name, score in evaluate_server(model, parsed.shards, options, parsed.out):
        say(f"{name}: {score}")
    return 0


def _evaluate(parsed: argparse.Namespace) -> int:
    from voxtral_dist.distributed.world import joined_world
    from voxtral_dist.evaluate import evaluate

    options = _options(parsed)
    with joined_world() as world:
        for name, score in evaluate(parsed.model, parsed.shards, options, parsed.precision, parsed.out, world):
            if world.is_first:
                say(f"{name}: {score}")
    return 0


def _options(parsed: argparse.Namespace) -> EvaluationOptions:
    from voxtral_dist.evaluate import EvaluationOptions

    return EvaluationOptions(
        settings=_settings(parsed),
        detect_language=parsed.detect_language,
        context=_context(parsed),
        target_text=tuple(parsed.target_text),
    )


def _settings(parsed: argparse.Namespace) -> EvaluationConfig:
    return EvaluationConfig(
        **decoding_settings(parsed),
        measures_loss=not parsed.no_loss,
        normalizer=parsed.normalizer,
        slices=tuple(parsed.slices),
        speaker_field=parsed.speaker_field,
    )


def _context(parsed: argparse.Namespace) -> TestContextConfig | None:
    if parsed.distractors and parsed.words is None:
        raise UserError("`--distractors` needs a word list: name its file by `--words`.")
    if parsed.words is None:
        return None
    sizes = {"num_distractors": tuple(parsed.distractors)} if parsed.distractors else {}
    return TestContextConfig(words=parsed.words, **sizes)

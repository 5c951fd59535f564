"""Results on disk: the counts and rates of a test set in `NAME.json`, and its utterances in `NAME.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from voxtral_dist.errors import UserError, lower_first
from voxtral_dist.files import refuse_to_replace, write_atomically
from voxtral_dist.scoring.error_rates import ErrorRates
from voxtral_dist.scoring.hypotheses import scored_row
from voxtral_dist.scoring.results import TestSetResult
from voxtral_dist.scoring.utterances import ScoredUtterance
from voxtral_dist.text.json_text import parse_json


def result_files(name: str) -> tuple[str, str]:
    """The names of the two files that `write_results` writes."""
    return f"{name}.jsonl", f"{name}.json"


def write_results(folder: Path, name: str, utterances: Sequence[ScoredUtterance], result: TestSetResult) -> None:
    """Write `NAME.jsonl` and `NAME.json`; the folder is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, summary = (folder / file for file in result_files(name))
    rows = (json.dumps(scored_row(utterance), ensure_ascii=False) for utterance in utterances)
    write_atomically(lines, "".join(f"{row}\n" for row in rows))
    write_atomically(summary, json.dumps(result_row(result), indent=1, ensure_ascii=False))


def read_result(path: Path) -> TestSetResult:
    """Read a `NAME.json`.

    Raises:
        UserError: the file cannot be read, or is not the result of a test set.
    """
    try:
        row = TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
        return TypeAdapter(TestSetResult).validate_python(_nested(row))
    except OSError as error:
        raise UserError(f"The result {path} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"])) or "it"
        raise UserError(
            f"{path} is not the result of a test set ({place}: {lower_first(detail['msg'])}): write it again by "
            "`voxtral-dist score --out`."
        ) from error


def refuse_to_replace_others(option: str, folder: Path, name: str) -> None:
    """Refuse a folder in which `write_results` would replace files that are not results.

    Raises:
        UserError: `NAME.json` or `NAME.jsonl` exists and is not a result.
    """
    lines, summary = (folder / file for file in result_files(name))
    refuse_to_replace(option, lines, _holds_scored_rows)
    refuse_to_replace(option, summary, _is_result)


def result_row(result: TestSetResult) -> dict[str, Any]:
    """The contents of `NAME.json`: `docs/evaluation.md` lists the keys."""
    language, biased = result.language_identification, result.biased
    return {
        **_rates_row(result.normalized),
        "normalizer": result.normalizer,
        "orthographic": _rates_row(result.orthographic) | {"normalizer": result.orthographic_normalizer},
        "punctuation": None
        if result.punctuation is None
        else asdict(result.punctuation) | {"rate": result.punctuation.rate, "per": result.punctuation.match_error_rate},
        "num_without_spaces": result.num_without_spaces,
        "num_empty_hypotheses": result.num_empty_hypotheses,
        "num_empty_references": result.num_empty_references,
        "num_limit_hits": result.num_limit_hits,
        "num_repetition_loops": result.num_repetition_loops,
        "slices": {
            name: {label: _rates_row(part) for label, part in parts.items()} for name, parts in result.slices.items()
        },
        **asdict(result.measured),
        "rtfx": result.rtfx,
        "perplexity": result.measured.perplexity,
        "speaker_field": result.speaker_field,
        "language_identification": None if language is None else asdict(language) | {"accuracy": language.accuracy},
        "biased": None
        if biased is None
        else asdict(biased) | {"biased_wer": biased.biased_wer, "unbiased_wer": biased.unbiased_wer},
    }


def _rates_row(rates: ErrorRates) -> dict[str, Any]:
    return {
        "wer": rates.wer,
        "cer": rates.cer,
        "mer": rates.words.match_error_rate,
        "wil": rates.words.information_lost,
        **asdict(rates),
    }


def _nested(row: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of `NAME.json` in the shape of `TestSetResult`. Derived rates are computed again."""
    orthographic = row.get("orthographic")
    label = orthographic.get("normalizer") if isinstance(orthographic, dict) else None
    return {**row, "normalized": row, "measured": row, "orthographic_normalizer": label}


def _holds_scored_rows(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            row = parse_json(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and {"hypothesis", "word_substitutions"} <= row.keys()


def _is_result(path: Path) -> bool:
    try:
        read_result(path)
    except UserError:
        return False
    return True

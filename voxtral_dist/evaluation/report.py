"""What an evaluation found: a line for each utterance, and one summary, both written to disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from voxtral_dist.evaluation.normalizer import Normalizer
from voxtral_dist.evaluation.word_errors import (
    ErrorCounts,
    bootstrap_interval,
    count_character_errors,
    count_word_errors,
)


@dataclass(frozen=True)
class ScoredUtterance:
    """One line of `NAME.jsonl`."""

    sample_id: int
    key: str
    language: str | None
    duration_seconds: float
    reference: str
    hypothesis: str
    hit_limit: bool
    words: ErrorCounts
    characters: ErrorCounts


@dataclass(frozen=True)
class TestSetScore:
    """`NAME.json`: counts over a whole test set, and their rates. A rate of nothing is None."""

    wer: float | None
    wer_interval: tuple[float, float] | None
    cer: float | None
    num_utterances: int
    num_empty_hypotheses: int
    num_limit_hits: int
    audio_seconds: float
    words: ErrorCounts
    characters: ErrorCounts
    wer_by_language: dict[str, float | None]
    normalizer: str


def score_utterance(
    sample_id: int,
    key: str,
    language: str | None,
    duration_seconds: float,
    reference: str,
    hypothesis: str,
    hit_limit: bool,
    normalizer: Normalizer,
) -> ScoredUtterance:
    """The edits between a reference and a hypothesis after normalization; both are kept as they were."""
    normalized = normalizer.apply(reference), normalizer.apply(hypothesis)
    return ScoredUtterance(
        sample_id=sample_id,
        key=key,
        language=language,
        duration_seconds=duration_seconds,
        reference=reference,
        hypothesis=hypothesis,
        hit_limit=hit_limit,
        words=count_word_errors(*normalized),
        characters=count_character_errors(*normalized),
    )


def score_test_set(utterances: Sequence[ScoredUtterance], normalizer: Normalizer) -> TestSetScore:
    """Sums of counts over utterances, divided once."""
    words = sum((utterance.words for utterance in utterances), ErrorCounts())
    characters = sum((utterance.characters for utterance in utterances), ErrorCounts())
    return TestSetScore(
        wer=words.rate,
        wer_interval=bootstrap_interval([utterance.words for utterance in utterances]),
        cer=characters.rate,
        num_utterances=len(utterances),
        num_empty_hypotheses=sum(not utterance.hypothesis for utterance in utterances),
        num_limit_hits=sum(utterance.hit_limit for utterance in utterances),
        audio_seconds=sum(utterance.duration_seconds for utterance in utterances),
        words=words,
        characters=characters,
        wer_by_language=_wer_by_language(utterances),
        normalizer=normalizer.label,
    )


def write_results(folder: Path, name: str, utterances: Sequence[ScoredUtterance], score: TestSetScore) -> None:
    """Write `NAME.jsonl` and `NAME.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(_row(utterance), ensure_ascii=False) + "\n" for utterance in utterances)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(asdict(score), indent=1, ensure_ascii=False), encoding="utf-8")


def _wer_by_language(utterances: Sequence[ScoredUtterance]) -> dict[str, float | None]:
    languages = sorted({utterance.language or "unknown" for utterance in utterances})
    return {
        language: sum(
            (utterance.words for utterance in utterances if (utterance.language or "unknown") == language),
            ErrorCounts(),
        ).rate
        for language in languages
    }


def _row(utterance: ScoredUtterance) -> dict[str, object]:
    row = asdict(utterance)
    words, characters = row.pop("words"), row.pop("characters")
    return (
        row
        | {f"word_{name}": count for name, count in words.items()}
        | {f"character_{name}": count for name, count in characters.items()}
    )

"""What an evaluation found: a line for each utterance, and one summary, both written to disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from voxtral_dist.data.context import WordList
from voxtral_dist.evaluation.normalizer import Normalizer
from voxtral_dist.evaluation.word_errors import (
    ErrorCounts,
    bootstrap_interval,
    count_biased_errors,
    count_character_errors,
    count_word_errors,
)


@dataclass(frozen=True, kw_only=True)
class DecodedUtterance:
    """An utterance of a test set with what a model made of it.

    language, detected_language: ISO 639-1 codes, None where not known or not named. asks_for_language: whether the
    prompt left it to the model to name the language. context: that of the prompt.
    """

    sample_id: int
    key: str
    language: str | None
    duration_seconds: float
    reference: str
    hypothesis: str
    hit_limit: bool
    detected_language: str | None = None
    asks_for_language: bool = False
    context: str = ""


@dataclass(frozen=True, kw_only=True)
class ScoredUtterance(DecodedUtterance):
    """One line of `NAME.jsonl`. biased_words: the edits of listed words, where the test set has a list."""

    words: ErrorCounts
    characters: ErrorCounts
    biased_words: ErrorCounts | None = None


@dataclass(frozen=True)
class LanguageIdentification:
    """How often the model named the language of the speech, among utterances whose language is known.

    num_undetected: utterances for which it named none; they are not correct.
    """

    num_utterances: int
    num_correct: int
    num_undetected: int
    accuracy: float


@dataclass(frozen=True)
class BiasedScore:
    """The error rates of listed words (B-WER) and of all others (U-WER), with the counts of the listed ones.

    num_distractors: of the lists in the prompts, besides the true words; None where prompts had no list.
    """

    num_distractors: int | None
    biased_wer: float | None
    unbiased_wer: float | None
    biased_words: ErrorCounts


@dataclass(frozen=True)
class TestSetScore:
    """`NAME.json`: counts over a whole test set, and their rates. A rate of nothing is None."""

    __test__ = False  # pytest takes it for a test

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
    language_identification: LanguageIdentification | None = None
    biased: BiasedScore | None = None

    def figures(self) -> dict[str, float | int | None]:
        """The rates of a row of metrics, with those that only some test sets have."""
        figures: dict[str, float | int | None] = {"wer": self.wer, "cer": self.cer}
        if self.language_identification is not None:
            figures["language_accuracy"] = self.language_identification.accuracy
        if self.biased is not None:
            figures |= {"biased_wer": self.biased.biased_wer, "unbiased_wer": self.biased.unbiased_wer}
        return figures | {"num_utterances": self.num_utterances}

    def __str__(self) -> str:
        said = [f"WER {_percent(self.wer)}"]
        if self.biased is not None:
            said.append(f"B-WER {_percent(self.biased.biased_wer)}, U-WER {_percent(self.biased.unbiased_wer)}")
        if self.language_identification is not None:
            said.append(f"language right in {_percent(self.language_identification.accuracy)}")
        return ", ".join([*said, f"{self.num_utterances} utterances, normalizer {self.normalizer}"])


def score_utterance(
    utterance: DecodedUtterance, normalizer: Normalizer, listed: WordList | None = None
) -> ScoredUtterance:
    """The edits between reference and hypothesis after normalization; both are kept as they were."""
    normalized = normalizer.apply(utterance.reference), normalizer.apply(utterance.hypothesis)
    return ScoredUtterance(
        **vars(utterance),
        words=count_word_errors(*normalized),
        characters=count_character_errors(*normalized),
        biased_words=None if listed is None else count_biased_errors(*normalized, listed),
    )


def score_test_set(
    utterances: Sequence[ScoredUtterance], normalizer: Normalizer, num_distractors: int | None = None
) -> TestSetScore:
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
        language_identification=_language_identification(utterances),
        biased=_biased(utterances, words, num_distractors),
    )


def write_results(folder: Path, name: str, utterances: Sequence[ScoredUtterance], score: TestSetScore) -> None:
    """Write `NAME.jsonl` and `NAME.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(_row(utterance), ensure_ascii=False) + "\n" for utterance in utterances)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(asdict(score), indent=1, ensure_ascii=False), encoding="utf-8")


def _percent(rate: float | None) -> str:
    return "n/a" if rate is None else f"{100 * rate:.2f} %"


def _wer_by_language(utterances: Sequence[ScoredUtterance]) -> dict[str, float | None]:
    languages = sorted({utterance.language or "unknown" for utterance in utterances})
    return {
        language: sum(
            (utterance.words for utterance in utterances if (utterance.language or "unknown") == language),
            ErrorCounts(),
        ).rate
        for language in languages
    }


def _language_identification(utterances: Sequence[ScoredUtterance]) -> LanguageIdentification | None:
    asked = [one for one in utterances if one.asks_for_language and one.language is not None]
    if not asked:
        return None
    num_correct = sum(one.detected_language == one.language for one in asked)
    num_undetected = sum(one.detected_language is None for one in asked)
    return LanguageIdentification(len(asked), num_correct, num_undetected, num_correct / len(asked))


def _biased(
    utterances: Sequence[ScoredUtterance], words: ErrorCounts, num_distractors: int | None
) -> BiasedScore | None:
    counts = [utterance.biased_words for utterance in utterances if utterance.biased_words is not None]
    if not counts:
        return None
    biased = sum(counts, ErrorCounts())
    return BiasedScore(num_distractors, biased.rate, (words - biased).rate, biased)


def _row(utterance: ScoredUtterance) -> dict[str, object]:
    row = asdict(utterance)
    for name in ("word", "character", "biased_word"):
        counts = row.pop(f"{name}s")
        row |= {f"{name}_{kind}": count for kind, count in (counts or {}).items()}
    return row

"""What an evaluation found: a line for each utterance, and one summary, both written to disk."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from voxtral_dist.errors import UserError, lower_first
from voxtral_dist.files import refuse_to_replace, write_atomically
from voxtral_dist.scoring.normalizer import Normalizer
from voxtral_dist.scoring.slices import ErrorRates, Grouping, SliceScore, error_rates, score_slice, score_slices
from voxtral_dist.scoring.utterances import ScoredUtterance
from voxtral_dist.scoring.word_errors import ErrorCounts


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
class Measurements:
    """What only the process that had the model knows of a test set; None where it was not measured.

    decode_seconds: from the first to the last utterance, on the clock of the slowest rank. loss: the mean negative
    logarithm (base e) of the probability of a target token.
    """

    decode_seconds: float | None = None
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class OrthographicRates(ErrorRates):
    """Rates in which case and punctuation count."""

    normalizer: str


@dataclass(frozen=True, kw_only=True)
class TestSetScore(SliceScore):
    """`NAME.json`: counts over a whole test set, and their rates. A rate of nothing is None.

    num_empty_references: after normalization; the words of their hypotheses are insertions. rtfx: seconds of audio for
    each second of decoding. perplexity: e to the loss. speaker_field: which names the speaker of an utterance.
    """

    __test__ = False  # pytest takes it for a test

    normalizer: str
    orthographic: OrthographicRates
    num_empty_hypotheses: int
    num_empty_references: int
    num_limit_hits: int
    num_repetition_loops: int
    slices: dict[str, dict[str, SliceScore]]
    decode_seconds: float | None = None
    rtfx: float | None = None
    loss: float | None = None
    perplexity: float | None = None
    speaker_field: str | None = None
    language_identification: LanguageIdentification | None = None
    biased: BiasedScore | None = None

    def figures(self) -> dict[str, float | int | None]:
        """The rates of a row of metrics, with those that only some test sets have."""
        figures: dict[str, float | int | None] = {
            "wer": self.wer,
            "cer": self.cer,
            "orthographic_wer": self.orthographic.wer,
            "orthographic_cer": self.orthographic.cer,
        }
        measured = {"loss": self.loss, "perplexity": self.perplexity, "rtfx": self.rtfx}
        figures |= {name: value for name, value in measured.items() if value is not None}
        if self.language_identification is not None:
            figures["language_accuracy"] = self.language_identification.accuracy
        if self.biased is not None:
            figures |= {"biased_wer": self.biased.biased_wer, "unbiased_wer": self.biased.unbiased_wer}
        return figures | {
            "num_utterances": self.num_utterances,
            "num_empty_hypotheses": self.num_empty_hypotheses,
            "num_limit_hits": self.num_limit_hits,
            "num_repetition_loops": self.num_repetition_loops,
        }

    def __str__(self) -> str:
        said = [f"WER {percent(self.wer)}"]
        if self.biased is not None:
            said.append(f"B-WER {percent(self.biased.biased_wer)}, U-WER {percent(self.biased.unbiased_wer)}")
        if self.language_identification is not None:
            said.append(f"language right in {percent(self.language_identification.accuracy)}")
        return ", ".join([*said, f"{self.num_utterances} utterances, normalizer {self.normalizer}"])


def score_test_set(
    utterances: Sequence[ScoredUtterance],
    normalizer: Normalizer,
    num_distractors: int | None = None,
    grouping: Grouping | None = None,
    measured: Measurements | None = None,
) -> TestSetScore:
    """Sums of counts over utterances, divided once."""
    grouping, measured = grouping or Grouping(), measured or Measurements()
    whole = score_slice(utterances, grouping)
    return TestSetScore(
        **vars(whole),
        normalizer=normalizer.label,
        orthographic=_orthographic(utterances, normalizer, grouping),
        num_empty_hypotheses=sum(not one.hypothesis.strip() for one in utterances),
        num_empty_references=sum(not one.words.reference_length for one in utterances),
        num_limit_hits=sum(one.hit_limit for one in utterances),
        num_repetition_loops=sum(one.has_repetition_loop for one in utterances),
        slices=score_slices(utterances, grouping),
        decode_seconds=measured.decode_seconds,
        rtfx=_ratio(whole.audio_seconds, measured.decode_seconds),
        loss=measured.loss,
        perplexity=_perplexity(measured.loss),
        speaker_field=grouping.speaker_field,
        language_identification=_language_identification(utterances),
        biased=_biased(utterances, whole.words, num_distractors),
    )


def result_files(name: str) -> tuple[str, str]:
    """The names of the files that `write_results` makes."""
    return f"{name}.jsonl", f"{name}.json"


def write_results(folder: Path, name: str, utterances: Sequence[ScoredUtterance], score: TestSetScore) -> None:
    """Write `NAME.jsonl` and `NAME.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, figures = (folder / file for file in result_files(name))
    write_atomically(lines, "".join(json.dumps(utterance.row(), ensure_ascii=False) + "\n" for utterance in utterances))
    write_atomically(figures, json.dumps(asdict(score), indent=1, ensure_ascii=False))


def refuse_to_replace_others(option: str, folder: Path, name: str) -> None:
    """Refuse a folder in which `write_results` would replace what it has not made.

    Raises:
        UserError: `NAME.json` or `NAME.jsonl` is there, and is no result.
    """
    lines, figures = (folder / file for file in result_files(name))
    refuse_to_replace(option, lines, _holds_scored_lines)
    refuse_to_replace(option, figures, _is_score)


def _holds_scored_lines(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            row = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and {"hypothesis", "word_substitutions"} <= row.keys()


def _is_score(path: Path) -> bool:
    try:
        read_score(path)
    except UserError:
        return False
    return True


def read_score(path: Path) -> TestSetScore:
    """The score in a `NAME.json`.

    Raises:
        UserError: it cannot be read, or is not of this form.
    """
    try:
        return TypeAdapter(TestSetScore).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"The score {path} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"])) or "it"
        raise UserError(
            f"{path} is not the score of a test set ({place}: {lower_first(detail['msg'])}): write "
            "it again by `voxtral-dist score --out`."
        ) from error


def percent(rate: float | None) -> str:
    """Such as `12.34 %`; `n/a` of nothing."""
    return "n/a" if rate is None else f"{100 * rate:.2f} %"


def _orthographic(
    utterances: Sequence[ScoredUtterance], normalizer: Normalizer, grouping: Grouping
) -> OrthographicRates:
    rates = error_rates(
        [one.orthographic_words for one in utterances],
        [one.orthographic_characters for one in utterances],
        [grouping.speaker(one) for one in utterances],
    )
    return OrthographicRates(**vars(rates), normalizer=normalizer.orthographic.label)


def _perplexity(loss: float | None) -> float | None:
    """None where there is none, and where it is more than a number can be."""
    try:
        return None if loss is None else math.exp(loss)
    except OverflowError:
        return None


def _ratio(amount: float | None, seconds: float | None) -> float | None:
    return amount / seconds if amount is not None and seconds else None


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

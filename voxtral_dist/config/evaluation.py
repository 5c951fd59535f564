"""Section `evaluation`: test sets, decoding, scoring, and the selection of the best checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from voxtral_dist.config.section import FileName, Section, is_function_name, sorted_set

# The token limit of a hypothesis is this plus `max_tokens_per_second` times its duration.
MIN_NEW_TOKENS = 16
NORMALIZERS = ("none", "basic", "whisper_english", "whisper_basic", "open_asr_en")
_PINNED = re.compile(r"open_asr_en@[0-9a-f]{7,40}")


def check_normalizer(name: str) -> str:
    """The name of a normalizer, if it is one of `NORMALIZERS`, `open_asr_en@COMMIT`, or has the form `module:function`.

    Raises:
        ValueError: it is neither; the message continues a sentence that begins with the name of the setting.
    """
    if name in NORMALIZERS or _PINNED.fullmatch(name) or is_function_name(name):
        return name
    raise ValueError(f"must be {', '.join(NORMALIZERS)}, or a function as `module:function`, but is {name!r} instead")


class TestContextConfig(Section):
    """Lists of context words in the prompts of a test set.

    The set is decoded once without lists, as `NAME`, and once with each number N of distractors, as
    `NAME-distractors-N`. The list of an utterance has all words of the file that its reference contains (true words)
    and N others (distractors), as in Le et al., arXiv 2104.02194.
    """

    words: Path
    """A text file with one word or phrase per line. The error rate of these words is the B-WER, that of all others the
    U-WER."""

    num_distractors: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(sorted_set)] = (0, 100)
    """Numbers of distractors to measure with. 0 lists true words only."""


class TestSetConfig(Section):
    """A shard set whose word error rate is measured."""

    shards: str
    """A folder or URL with an index, or a pattern, in the form of `train_data.shards`."""

    max_utterances: int | None = Field(default=None, gt=0)
    """Evaluate only this many utterances, the first ones of the index, for quick evaluations in training. None: all."""

    detect_language: bool = False
    """Omit the language from prompts, and report detection accuracy."""

    context: TestContextConfig | None = None
    """Also decode the set with lists of context words. None: without lists only."""


ErrorRate = Literal["wer", "cer"]


class GuardConfig(Section):
    """A test set of another domain, whose WER must not rise by fine-tuning (catastrophic forgetting)."""

    test_set: FileName
    """Name of the guarded set, one of `evaluation.test_sets`."""

    max_wer_increase: float = Field(default=0.01, ge=0)
    """Maximum rise of its WER above that of the initial model, as a fraction: 0.01 is one percentage point. A
    checkpoint above it is never selected."""

    metric: ErrorRate = "wer"
    """The error rate that is limited: `wer`, or `cer` for a set in a language without spaces between words."""

    action: Literal["warn", "stop"] = "warn"
    """What happens above the limit: `warn` logs it, `stop` also ends the run."""


class SelectionConfig(Section):
    """Selection of the checkpoint with the lowest error rate: it is kept, named in `run_dir/best.json`, and exported at
    the end."""

    test_set: FileName
    """Name of the test set whose error rate decides, one of `evaluation.test_sets`."""

    metric: ErrorRate = "wer"
    """The error rate that decides: `wer` (words) or `cer` (characters). Take `cer` for Chinese, Japanese, Thai and
    other languages without spaces between words, where each utterance is one word, right or wrong as a whole. Reports
    and model cards judge the set by `cer` then."""

    patience: int | None = Field(default=None, gt=0)
    """The run ends early after this many evaluations in a row without improvement. None: it does not end early."""

    min_improvement: float = Field(default=0.0, ge=0)
    """Minimum fall of the error rate that counts as improvement, as a fraction: 0.001 is a tenth of a percentage point.
    Does nothing without `patience`."""

    guard: GuardConfig | None = None
    """A test set of another domain whose error rate limits the selection. None: no limit."""

    def metric_of(self, test_set: str) -> ErrorRate | None:
        """The error rate that decides on a test set; None for sets that the selection does not look at."""
        deciding = [one for one in (self, self.guard) if one is not None and one.test_set == test_set]
        return deciding[0].metric if deciding else None


class EvaluationConfig(Section):
    """Test sets, decoding, scoring, and the times of evaluations."""

    test_sets: dict[FileName, TestSetConfig] = Field(default_factory=dict)
    """Test sets by name. Result files are named after them. Empty: nothing is evaluated."""

    every_steps: int | None = Field(default=None, gt=0)
    """Steps between evaluations. None: only at the end, and at the start with `at_start`."""

    at_start: bool = True
    """Also evaluate the model before the first step, for comparison."""

    batch_size: int = Field(default=8, gt=0)
    """Maximum utterances that a rank decodes at a time. Does not change hypotheses in float32. A step takes a GPU about
    as long for 64 utterances as for 8; where the memory suffices (`voxtral-dist plan`), take more."""

    max_windows: int = Field(default=64, gt=0)
    """Maximum encoder windows that a rank decodes at a time, so that long utterances form smaller batches. An utterance
    with more windows is decoded alone."""

    num_beams: int = Field(default=1, gt=0)
    """Beams of the beam search; 1 decodes greedily."""

    static_cache: bool = False
    """In beam searches, use a key-value cache of fixed size, which torch.compile can use on GPUs. Does nothing where
    ranks decode in lockstep (see `weights`), nor in greedy decoding, which always has such a cache, of its own."""

    weights: Literal["auto", "gathered", "sharded"] = "auto"
    """Weights in evaluations under ZeRO-3 and FSDP2. `gathered`: a whole copy on every rank, which decodes on its own:
    fast. `sharded`: weights are gathered block by block for every token, with all ranks in lockstep: slow, in the
    memory of training. `auto`: `gathered` where the free memory of every rank suffices. Does nothing under ZeRO-0, 1
    and 2."""

    ema: bool | None = None
    """Evaluate, select and export the moving averages of the weights (true), or the weights of the step (false). Does
    nothing without `optimizer.ema_decay`. None: averages, where there are any; for a checkpoint what its run does."""

    measures_loss: bool = True
    """Also measure the loss of the targets. Greedy decoding does so in the forward pass over the prompts; beam searches
    and lockstep need one more pass of the language model."""

    max_tokens_per_second: float = Field(default=12.5, gt=0, lt=1e9)
    """Limit of a hypothesis: `16 + max_tokens_per_second * duration` tokens, with the duration in seconds. Results
    report how many hypotheses reached it."""

    normalizer: str = "basic"
    """Normalizer of references and hypotheses before scoring: `none`, `basic`, `whisper_english`, `whisper_basic`,
    `open_asr_en` or `open_asr_en@COMMIT`, or a function from text to text as `module:function`; see docs/evaluation.md.
    Error rates with case and punctuation are always reported too."""

    slices: tuple[str, ...] = ()
    """Keys of the utterances' json, such as `[speaker, domain]`. Error rates are also reported for each value of each
    key, as they always are for each language and each range of durations."""

    speaker_field: str = "speaker"
    """Key of the utterances' json that names the speaker. Confidence intervals resample speakers instead of utterances
    where every utterance of a set has this key and there are at least 5 speakers. Does nothing for other sets."""

    selection: SelectionConfig | None = None
    """Select the best checkpoint, and end the run early. None: the last checkpoint is exported."""

    @model_validator(mode="after")
    def _can_select(self) -> Self:
        if self.selection is None:
            return self
        guard = self.selection.guard
        named = {"test_set": self.selection.test_set} | ({"guard.test_set": guard.test_set} if guard else {})
        for key, name in named.items():
            if name not in self.test_sets:
                known = ", ".join(self.test_sets)
                raise ValueError(
                    f"`evaluation.selection.{key}` must be one of `evaluation.test_sets` ({known}), but is `{name}` "
                    "instead"
                )
        if self.every_steps is None:
            raise ValueError("`evaluation.selection` compares the evaluations of a run: set `evaluation.every_steps`")
        if guard and not self.at_start:
            raise ValueError(
                "`evaluation.selection.guard` compares with the initial model: set `evaluation.at_start: true`"
            )
        return self

    @model_validator(mode="after")
    def _has_a_normalizer(self) -> Self:
        try:
            check_normalizer(self.normalizer)
        except ValueError as error:
            raise ValueError(f"`evaluation.normalizer` {error}") from error
        return self

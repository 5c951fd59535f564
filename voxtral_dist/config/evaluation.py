"""Section `evaluation`: test sets, decoding, scoring, and the selection of the best checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from voxtral_dist.config.section import FileName, Section, sorted_set

NORMALIZERS = ("none", "basic", "whisper_english", "whisper_basic")


def check_normalizer(name: str) -> str:
    """The name, if it is one of `NORMALIZERS` or of the form `module:function`.

    Raises:
        ValueError: it is neither; the sentence goes on after the name of the setting.
    """
    module, _, function = name.partition(":")
    if name in NORMALIZERS or all(part.isidentifier() for part in (*module.split("."), *function.split("."))):
        return name
    raise ValueError(f"must be {', '.join(NORMALIZERS)}, or a function as `module:function`, but is {name!r} instead")


class TestContextConfig(Section):
    """Lists of words in the prompts of a test set, which is decoded once without a list and once with each size.

    The list of an utterance has all words of the file that its reference holds, and distractors (Le et al., arXiv
    2104.02194). Results are those of NAME, and of `NAME-distractors-N` for each size.
    """

    words: Path
    """As `train_data.context.words`. Their error rate in references is the B-WER, that of all other words the U-WER."""

    num_distractors: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(sorted_set)] = (0, 100)
    """Sizes of the lists, besides the true words."""


class TestSetConfig(Section):
    """One shard folder whose word error rate is measured."""

    shards: str
    """A folder or URL with an index, or a pattern: see `train_data.shards`."""

    max_utterances: int | None = Field(default=None, gt=0)
    """Only the first utterances in the order of the index: for quick looks while training."""

    detect_language: bool = False
    """Prompts do not tell the language, and the accuracy of the detected ones is reported."""

    context: TestContextConfig | None = None
    """Decode the set with lists of words too."""


class GuardConfig(Section):
    """A test set of another domain, which fine-tuning must not make the model forget."""

    test_set: FileName
    """One of `evaluation.test_sets`."""

    max_wer_increase: float = Field(default=0.01, ge=0)
    """Its WER may rise by so much above that of the model that the run began with; 0.01 is one point. A checkpoint
    above it is never the best one."""

    action: Literal["warn", "stop"] = "warn"
    """Say it and go on, or end the run."""


class SelectionConfig(Section):
    """The best checkpoint by WER: it is kept, named in `run_dir/best.json`, and exported at the end."""

    test_set: FileName
    """One of `evaluation.test_sets`, whose WER decides."""

    patience: int | None = Field(default=None, gt=0)
    """The run ends after so many evaluations in a row without improvement. None: never."""

    min_improvement: float = Field(default=0.0, ge=0)
    """A smaller fall of the WER does not count as improvement for `patience`; 0.001 is a tenth of a point."""

    guard: GuardConfig | None = None
    """Another set whose WER may not rise."""


class EvaluationConfig(Section):
    """How and when transcripts are generated and compared with their references."""

    test_sets: dict[FileName, TestSetConfig] = Field(default_factory=dict)
    """By name; the name becomes the file name of its results."""

    every_steps: int | None = Field(default=None, gt=0)
    """None: only at the end (and at the start if `at_start`)."""

    at_start: bool = True
    """Measure the untrained model too, so that there is something to compare with."""

    batch_size: int = Field(default=8, gt=0)
    """Utterances that a rank decodes at a time. Does not change hypotheses in float32."""

    max_windows: int = Field(default=64, gt=0)
    """Windows that a rank decodes at a time, so that long clips come in smaller batches; a longer one comes alone."""

    num_beams: int = Field(default=1, gt=0)
    """Hypotheses that a beam search keeps of each utterance; 1 decodes greedily."""

    static_cache: bool = False
    """Keep room for all tokens of a batch from its start, as torch.compile wants it on GPUs; not in lockstep."""

    weights: Literal["auto", "gathered", "sharded"] = "auto"
    """Of ZeRO-3 and FSDP2 in evaluations. `gathered`: whole on every rank, which decodes on its own. `sharded`: block
    by block for every token, with all ranks in lockstep, in the memory of training. `auto`: whole where the free memory
    of every rank has room for it."""

    measures_loss: bool = True
    """Measure the loss of the targets too: one more pass of the language model."""

    max_tokens_per_second: float = Field(default=12.5, gt=0, lt=1e9)
    """A hypothesis ends at `16 + max_tokens_per_second * duration` tokens; how often that happened is reported."""

    normalizer: str = "basic"
    """Applied to reference and hypothesis before words are compared: `none`, `basic`, `whisper_english`,
    `whisper_basic`, or a function of yours on text as `module:function`; see docs/evaluation.md. Rates in which case
    and punctuation count are always reported too."""

    slices: tuple[str, ...] = ()
    """Keys of the samples' json, such as `[speaker, domain]`: each of their values gets rates of its own, as each
    language and each range of durations always do."""

    speaker_field: str = "speaker"
    """The key of the samples' json that names the speaker. Where each utterance of a set has it and there are at least
    5 speakers, confidence intervals resample speakers instead of utterances."""

    selection: SelectionConfig | None = None
    """Choose the best checkpoint, and end early. None: the last one is exported."""

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
            raise ValueError("`evaluation.selection` chooses among evaluations: set `evaluation.every_steps`")
        if guard and not self.at_start:
            raise ValueError(
                "`evaluation.selection.guard` compares with the model that the run begins with: set "
                "`evaluation.at_start: true`"
            )
        return self

    @model_validator(mode="after")
    def _has_a_normalizer(self) -> Self:
        try:
            check_normalizer(self.normalizer)
        except ValueError as error:
            raise ValueError(f"`evaluation.normalizer` {error}") from error
        return self

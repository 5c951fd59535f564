"""Sections `train_data` and `storage`: shard sets, mixtures, batches, augmentation, and access to remote shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_extra_types.language_code import LanguageAlpha2

from voxtral_dist.config.section import Argument, FileName, Section, TextStep, sorted_set


class AugmentationStep(Section):
    """One transform of the waveform, of training utterances only."""

    name: str
    """Class name of a transform of the package audiomentations, such as `Gain` or `AddGaussianSNR`, or
    `LengthAwareTimeStretch` of this package."""

    arguments: dict[str, Argument | list[Argument]] = Field(default_factory=dict)
    """Keyword arguments of the class; `p` is the probability that the transform is applied to an utterance.
    `max_duration_seconds` of `LengthAwareTimeStretch` is the longest audio that it makes, in seconds."""


class ShardSetConfig(Section):
    """One of several training sets that are mixed."""

    shards: tuple[str, ...] = Field(min_length=1)
    """Locations of the set's shards, in the form of `train_data.shards`."""

    weight: float | None = Field(default=None, gt=0)
    """Fraction of the drawn audio, relative to the weights of the other sets: either all sets have one or none has.
    None: `set_temperature` decides."""


class SpecAugmentConfig(Section):
    """Masks on the log-mel features (SpecAugment: Park et al., arXiv 1904.08779), which set values to 0 in training."""

    num_time_masks: int = Field(default=2, ge=0)
    """Time masks per clip, however many windows it has. 0 disables them."""

    max_time_mask_seconds: float = Field(default=1.0, ge=0)
    """Maximum width of a time mask, in seconds. Widths are drawn uniformly from 0 to the smaller of this limit and
    `max_time_mask_fraction`."""

    max_time_mask_fraction: float = Field(default=0.05, ge=0, le=1)
    """Maximum width of a time mask as a fraction of the clip's length, so that short clips get narrow masks (Park et
    al., arXiv 1912.05533)."""

    num_frequency_masks: int = Field(default=2, ge=0)
    """Frequency masks per clip: bands of neighbouring mel bins, over the clip's whole length. 0 disables them."""

    max_frequency_mask_bins: int = Field(default=27, ge=0)
    """Maximum width of a frequency mask, in mel bins (published models have 128). Widths are drawn uniformly from 0."""


class ContextConfig(Section):
    """Context in training prompts: lists of words and previous text, so that the model learns to use them.

    A list holds words that the transcript contains (true words) and words that it does not contain (distractors), as in
    arXiv 2506.06252. See docs/context.md. At least one of `words`, `words_field` and `previous_text_field` must be set.
    """

    words: Path | None = None
    """A text file with one word or phrase per line. The lines that a transcript contains are its true words;
    distractors are drawn from the other lines. None: no lists from a file."""

    words_field: str | None = None
    """Key of an utterance's json with words of its own, such as the names of people in a meeting: a JSON list, or a
    text separated by commas. The words that the transcript contains are true words; the others are distractors, which
    are always listed. None: no lists from utterances."""

    previous_text_field: str | None = None
    """Key of an utterance's json with the text that was said before it. None: no previous text in prompts."""

    fraction: float = Field(default=0.5, ge=0, le=1)
    """Fraction of utterances whose prompt has a context. The others keep the model accurate without one."""

    true_word_fraction: float = Field(default=0.9, ge=0, le=1)
    """Probability that a true word is listed, so that the model learns that lists may be incomplete."""

    max_distractors: int = Field(default=20, ge=0)
    """Maximum number of distractors from `words` in a list; the number is drawn uniformly from 0. Does nothing without
    `words`."""

    max_tokens: int = Field(default=256, gt=0)
    """Maximum tokens of a context. Words that do not fit are not listed, and previous text loses its beginning.
    Micro-batches are sized as if every prompt had this many."""

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.words is None and self.words_field is None and self.previous_text_field is None:
            raise ValueError(
                "`train_data.context` must name `words`, `words_field` or `previous_text_field`, but names none instead"
            )
        return self


class StorageConfig(Section):
    """Reading of shards and indices at URLs, such as `s3://bucket/set`. Does nothing for local files.

    Credentials, endpoints and proxies come from the settings of each backend: `AWS_PROFILE`, `AWS_ENDPOINT_URL`,
    `GOOGLE_APPLICATION_CREDENTIALS`, `HF_TOKEN`, `HTTPS_PROXY`, `~/.netrc`, and fsspec's own variables, such as
    `FSSPEC_S3_ANON=true` for public buckets.
    """

    cache_dir: Path | None = None
    """Cache folder on a local disk of each node: a node fetches each piece of a remote shard once, for all its
    processes and epochs. What `torch.compile` compiles is kept in its folder `torch-compile`, unless
    `TORCHINDUCTOR_CACHE_DIR` is set. None: every read goes to the URL, and torch compiles into its own folder."""

    cache_gigabytes: float = Field(default=100.0, gt=0)
    """Maximum size of the cache, in 10^9 bytes; the least recently used pieces are removed first. It also limits the
    copies of indices, which are stored in `~/.cache/voxtral-dist` where there is no `cache_dir`."""

    cache_chunk_megabytes: float = Field(default=4.0, gt=0)
    """Size of the pieces that are fetched and removed, in 2^20 bytes. Does nothing without `cache_dir`."""

    num_reads_in_flight: int = Field(default=16, gt=0)
    """Maximum concurrent requests of a process. Each data worker is a process."""

    prefetch_megabytes: float = Field(default=256.0, ge=0)
    """Maximum data that a process reads ahead of its use, in 2^20 bytes. 0 disables reading ahead."""

    num_attempts: int = Field(default=6, gt=0)
    """Attempts of a request, with random and growing pauses of up to 20 s in between. A missing or forbidden file gets
    two."""

    timeout_seconds: float = Field(default=30.0, gt=0)
    """Seconds after which an attempt counts as failed."""


class TrainDataConfig(Section):
    """The training data and its path into batches.

    A micro-batch is what one GPU processes in one forward pass; at least one of `max_examples`, `max_windows` and
    `max_tokens` must limit it. A step consumes `slots_per_step` micro-batches on any number of GPUs: rank r of W takes
    the slots r, r + W, r + 2 W, and so on.
    """

    shards: tuple[str, ...] = ()
    """Shard sets that together form one training set: folders or URLs (`s3://`, `gs://`, `https://`, `hf://`) with an
    index, globs and brace ranges of such folders, or patterns of tars inside a folder, which select some of its
    shards."""

    sets: dict[FileName, ShardSetConfig] = Field(default_factory=dict)
    """Several training sets by name, instead of `shards`. Every megabatch mixes them by their fractions of the
    audio."""

    set_temperature: float = Field(default=1.0, ge=1)
    """A set's fraction of the drawn audio is proportional to hours^(1 / set_temperature): 1 draws every utterance
    equally often, larger values draw small sets more often. Does nothing where sets have weights."""

    language_temperature: float = Field(default=1.0, ge=1)
    """The same for the languages inside each set. 1 ignores languages."""

    slots_per_step: int = Field(default=8, gt=0)
    """Micro-batches per optimizer update over all ranks. At least the number of ranks; with a multiple of it no rank
    idles."""

    max_examples: int | None = Field(default=None, gt=0)
    """Maximum examples in a micro-batch. An example is one utterance, or several with `packing`. None: no limit."""

    max_windows: int | None = Field(default=None, gt=0)
    """Maximum encoder windows in a micro-batch. Utterances with more windows are skipped. None: no limit."""

    max_tokens: int | None = Field(default=None, gt=0)
    """Maximum positions of the language model in a micro-batch, padding included. They are counted from the stored
    texts; `target_text` may add a few. Utterances with more positions are skipped. None: no limit."""

    packing: bool = False
    """Join short utterances of one language into examples of up to one window. This saves computation, but the model
    learns from audio with several sentences and speakers. The start of a run reports how full windows are."""

    megabatch_steps: int = Field(default=16, gt=0)
    """Steps whose utterances are sorted by cost together, so that a micro-batch holds utterances of similar length and
    needs little padding. 1 sorts within a step only."""

    shuffle_block_size: int = Field(default=1, gt=0)
    """Neighbouring utterances of a shard that are drawn into the same megabatch. Larger blocks make better use of
    `storage.cache_dir` and of a disk's page cache, and shuffle less. An object store without a cache still gets one
    request per utterance."""

    min_duration_seconds: float | None = Field(default=None, gt=0)
    """Utterances shorter than this many seconds are skipped; the start of a run reports how many. None: no limit."""

    max_duration_seconds: float | None = Field(default=None, gt=0)
    """Utterances longer than this many seconds are skipped; the start of a run reports how many. None: no limit."""

    min_chars_per_second: float | None = Field(default=None, gt=0)
    """Utterances with fewer characters of text per second of audio are skipped: their transcripts are incomplete. None:
    no limit."""

    max_chars_per_second: float | None = Field(default=None, gt=0)
    """Utterances with more characters of text per second of audio are skipped: their audio is incomplete. None:
    utterances above 40 characters per second and 50 characters count as unusable (see `max_bad_fraction`)."""

    languages: Annotated[tuple[LanguageAlpha2, ...], AfterValidator(sorted_set)] | None = None
    """ISO 639-1 codes of the languages to train on; other utterances are skipped. None: all utterances."""

    augmentation: tuple[AugmentationStep, ...] = ()
    """Transforms of the waveform, in this order. Their randomness depends on (seed, epoch, utterance) only, so it is
    the same on any worker. Never applied in evaluations."""

    spec_augment: SpecAugmentConfig | None = None
    """Masks on the features, with the same kind of randomness. None: no masks. Never applied in evaluations."""

    target_text: tuple[TextStep, ...] = ()
    """Steps that turn transcripts into training targets, in this order. Empty: transcripts are the targets.
    `lower_case` and `no_punctuation`, which keeps symbols, and apostrophes and hyphens inside words; or a function from
    text to text as `module:function`; see docs/data.md. Evaluations use the same steps, in the loss and on references
    and hypotheses before scoring. Answers to instructions are never changed."""

    max_target_tokens: int = Field(default=448, gt=0)
    """Maximum target tokens of an utterance, `</s>` included. Longer targets are never cut: see `too_long`."""

    too_long: Literal["skip", "refuse"] = "skip"
    """Treatment of utterances with more than `max_target_tokens`, or with more positions than the model has: `skip`
    skips and counts them, `refuse` ends the run with an error."""

    untagged_fraction: float = Field(default=0.1, ge=0, le=1)
    """Fraction of utterances whose prompt omits the language. Their targets begin with it (`lang:xx`) instead, so that
    the model keeps detecting languages. Does nothing for utterances of unknown language, which have no tag at all."""

    context: ContextConfig | None = None
    """Context in prompts, for context biasing. None: no context."""

    num_workers: int = Field(default=2, ge=0)
    """Worker processes per rank that read and decode audio; 0 does it in the rank's own process. Batches are the same
    for any number."""

    max_bad_fraction: float = Field(default=0.05, ge=0, le=1)
    """The run ends when more than this fraction of the utterances seen so far were unusable. Does nothing for the first
    200 utterances."""

    max_bad_in_a_row: int = Field(default=100, gt=0)
    """The run ends when more than this many utterances were unusable since the last step with a usable one."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if bool(self.shards) == bool(self.sets):
            has = "both" if self.shards else "none"
            raise ValueError(f"`train_data` must have either `train_data.shards` or `train_data.sets`, but has {has}")
        if self.max_examples is None and self.max_windows is None and self.max_tokens is None:
            raise ValueError(
                "`train_data` must limit a micro-batch by `max_examples`, `max_windows` or `max_tokens`, but sets none "
                "instead"
            )
        weighted = [name for name, one in self.sets.items() if one.weight is not None]
        if weighted and len(weighted) < len(self.sets):
            raise ValueError(
                f"`train_data.sets`: all sets or none must have a weight, but only {weighted} have instead"
            )
        return self

    @property
    def named_sets(self) -> dict[str, tuple[str, ...]]:
        """The locations of each training set, by name; a single one is called `all`."""
        return {name: one.shards for name, one in self.sets.items()} or {"all": self.shards}

    @property
    def mixes_sets(self) -> bool:
        """Whether sets or languages are drawn in other proportions than those of the stored audio."""
        weighted = any(one.weight for one in self.sets.values())
        return len(self.sets) > 1 and (weighted or self.set_temperature != 1 or self.mixes_languages)

    @property
    def mixes_languages(self) -> bool:
        """Whether languages are drawn in other proportions than those of the stored audio."""
        return self.language_temperature != 1

    def set_weight(self, name: str, duration_seconds: float) -> float:
        """The weight of a set that holds this much audio, relative to the other sets."""
        weight = self.sets[name].weight if name in self.sets else None
        return duration_seconds ** (1 / self.set_temperature) if weight is None else weight

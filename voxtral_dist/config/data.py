"""Sections `train_data` and `storage`: shard sets, mixtures, batches, augmentation, and how remote shards are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_extra_types.language_code import LanguageAlpha2

from voxtral_dist.config.section import Argument, FileName, Section, TextStep, sorted_set


class AugmentationStep(Section):
    """One transform of the waveform."""

    name: str
    """A class of audiomentations, such as `Gain` or `AddGaussianSNR`, or our `LengthAwareTimeStretch`."""

    arguments: dict[str, Argument | list[Argument]] = Field(default_factory=dict)
    """Its arguments by name; `p` is the probability that it is applied to an utterance."""


class ShardSetConfig(Section):
    """One of several shard sets that are mixed."""

    shards: tuple[str, ...] = Field(min_length=1)
    """As `train_data.shards`."""

    weight: float | None = Field(default=None, gt=0)
    """Its share of the audio that is drawn, relative to the other sets. None in all sets: by `set_temperature`."""


class SpecAugmentConfig(Section):
    """Masks on the log-mel features (SpecAugment: Park et al., arXiv 1904.08779): masked values become 0."""

    num_time_masks: int = Field(default=2, ge=0)
    """Spans of time in each clip, however many windows it has."""

    max_time_mask_seconds: float = Field(default=1.0, ge=0)
    """The width of a time mask is uniform between nothing and the smaller of this and the next limit."""

    max_time_mask_fraction: float = Field(default=0.05, ge=0, le=1)
    """Of the clip's own length: short clips get narrow masks (Park et al., arXiv 1912.05533)."""

    num_frequency_masks: int = Field(default=2, ge=0)
    """Bands of neighbouring mel bins in each clip, over its whole length."""

    max_frequency_mask_bins: int = Field(default=27, ge=0)
    """The width of a band is uniform between nothing and this many mel bins, of which the published models have 128."""


class ContextConfig(Section):
    """Words and previous text that prompts tell the model, so that it learns to use them; see docs/context.md.

    The idea: a list of words in the prompt, in training with true ones and distractors (arXiv 2506.06252).
    """

    words: Path | None = None
    """A text file with a word or a phrase in each line. Those that stand in a transcript are its true words, and
    distractors are drawn from the others."""

    words_field: str | None = None
    """A key of the sample's json with a list of words, or a text of them with commas between, such as the names of its
    meeting; those that its transcript holds are true words, the others distractors that always come with them."""

    previous_text_field: str | None = None
    """A key of the sample's json with the text that was said before it."""

    fraction: float = Field(default=0.5, ge=0, le=1)
    """Of the samples whose prompts have a context. The others keep the model good without one."""

    true_word_fraction: float = Field(default=0.9, ge=0, le=1)
    """Each true word is in the list with this probability: a list does not promise to be complete."""

    max_distractors: int = Field(default=20, ge=0)
    """Words of the file that the transcript does not hold: from none to so many, uniformly."""

    max_tokens: int = Field(default=256, gt=0)
    """Of a context. Words that do not fit are not in the list, and previous text loses its beginning. Micro-batches are
    cut as if every sample had so many."""

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.words is None and self.words_field is None and self.previous_text_field is None:
            raise ValueError(
                "`train_data.context` must name `words`, `words_field` or `previous_text_field`, but names none instead"
            )
        return self


class StorageConfig(Section):
    """How shards and indices are read that lie behind a URL, such as `s3://bucket/set`; local files need none of it.

    Credentials, endpoints and proxies come from each backend's own places: `AWS_PROFILE`, `AWS_ENDPOINT_URL`,
    `GOOGLE_APPLICATION_CREDENTIALS`, `HF_TOKEN`, `HTTPS_PROXY`, `~/.netrc`, and those of fsspec, such as
    `FSSPEC_S3_ANON=true` for public buckets.
    """

    cache_dir: Path | None = None
    """A folder on a disk of each node where pieces of remote shards are kept, so that a node fetches them once for all
    its processes and passes. None: shards are read from their URLs each time. Does nothing for local shards."""

    cache_gigabytes: float = Field(default=100.0, gt=0)
    """The folder never holds more (10^9 bytes); what was not used for the longest time is removed first. Also the limit
    of the copies of indices, which lie in `~/.cache/voxtral-dist` without a `cache_dir`."""

    cache_chunk_megabytes: float = Field(default=4.0, gt=0)
    """What is fetched and removed at a time (2^20 bytes). Does nothing without `cache_dir`."""

    num_reads_in_flight: int = Field(default=16, gt=0)
    """Requests that a process (each worker is one) has under way at the same time."""

    prefetch_megabytes: float = Field(default=256.0, ge=0)
    """Of the spans that will be needed soon, each process reads at most so much ahead (2^20 bytes); the rest is read
    when it is asked for."""

    num_attempts: int = Field(default=6, gt=0)
    """Of a request, with random pauses that grow up to 20 s in between. A missing or forbidden file has two."""

    timeout_seconds: float = Field(default=30.0, gt=0)
    """An attempt that has not ended by then counts as failed."""


class TrainDataConfig(Section):
    """The shards that are trained on, and how they become batches.

    A step consumes `slots_per_step` micro-batches whatever the number of GPUs: rank r of W takes the slots r, r + W,
    r + 2 W, and so on. A micro-batch is what one GPU holds in one forward pass; at least one of `max_examples`,
    `max_windows` and `max_tokens` limits it.
    """

    shards: tuple[str, ...] = ()
    """Shard sets: folders or URLs (`s3://`, `gs://`, `https://`, `hf://`) with an index, globs and brace ranges of
    them, or patterns of tars in such a folder, which take a part of it. Together they are one training set."""

    sets: dict[FileName, ShardSetConfig] = Field(default_factory=dict)
    """Several training sets by name, instead of `shards`, that are mixed in every sort window by their shares."""

    set_temperature: float = Field(default=1.0, ge=1)
    """Without weights, a set has the share hours^(1 / temperature) of the audio: 1 draws every utterance equally often,
    larger values draw small sets more often. Does nothing where sets have weights."""

    language_temperature: float = Field(default=1.0, ge=1)
    """The same over the languages inside each set. 1 does not tell languages apart."""

    slots_per_step: int = Field(default=8, gt=0)
    """Micro-batches per optimizer update over all ranks. At least the number of ranks; a multiple of it wastes
    nothing."""

    max_examples: int | None = Field(default=None, gt=0)
    """Examples in a micro-batch at most."""

    max_windows: int | None = Field(default=None, gt=0)
    """Windows of the encoder in a micro-batch at most. A longer utterance is left out."""

    max_tokens: int | None = Field(default=None, gt=0)
    """Positions of the language model in a micro-batch at most, padding included, by the tokens of the stored texts
    (`target_text` may make some more). A longer utterance is left out."""

    packing: bool = False
    """Join short utterances of one language into examples of up to one window. Fewer windows are computed, but the
    model learns from utterances with several sentences and speakers. At the start the fill of windows is reported."""

    megabatch_steps: int = Field(default=16, gt=0)
    """Utterances of this many steps are sorted by cost together, so that a micro-batch holds utterances of similar
    length. 1 sorts within a step only."""

    shuffle_block_size: int = Field(default=1, gt=0)
    """Neighbouring samples of a shard that are drawn in the same sort window. Larger blocks make a `storage.cache_dir`
    and the page cache of a disk more useful; requests to an object store without a cache stay one for each sample."""

    min_duration_seconds: float | None = Field(default=None, gt=0)
    """Shorter utterances are left out, and their number is reported at the start."""

    max_duration_seconds: float | None = Field(default=None, gt=0)
    """Longer utterances are left out, and their number is reported at the start."""

    min_chars_per_second: float | None = Field(default=None, gt=0)
    """Utterances with fewer characters of text per second of audio are left out: their transcripts miss something."""

    max_chars_per_second: float | None = Field(default=None, gt=0)
    """Utterances with more characters of text per second of audio are left out: their audio misses something. Without
    a limit, more than 40 (and more than 50 in all) make a bad sample."""

    languages: Annotated[tuple[LanguageAlpha2, ...], AfterValidator(sorted_set)] | None = None
    """Only utterances of these languages (ISO 639-1) are drawn."""

    augmentation: tuple[AugmentationStep, ...] = ()
    """Applied in this order to the waveform; drawn from (seed, pass, sample), so the same on any worker."""

    spec_augment: SpecAugmentConfig | None = None
    """Masks on the features, drawn in the same way. None: no masks. Never applied in evaluations."""

    target_text: tuple[TextStep, ...] = ()
    """Steps that make targets of transcripts, in this order; none: as they are. `no_punctuation` keeps apostrophes and
    hyphens inside words, and symbols. Evaluations go through the same: the loss is that of targets, and references and
    hypotheses are scored behind the steps. Answers to instructions stay as they are."""

    max_target_tokens: int = Field(default=448, gt=0)
    """Of a transcript, `</s>` included. Targets are never cut: see `too_long`."""

    too_long: Literal["skip", "refuse"] = "skip"
    """What becomes of samples with more than `max_target_tokens`, or with more positions than the model has: they are
    left out and counted, or the run is refused."""

    untagged_fraction: float = Field(default=0.1, ge=0, le=1)
    """Of the samples whose prompts do not tell the language; their completions begin with it (`lang:xx`), so that the
    model keeps detecting languages. Samples of unknown language have no tag at all."""

    context: ContextConfig | None = None
    """Words and previous text in prompts, for context biasing."""

    num_workers: int = Field(default=2, ge=0)
    """Processes per rank that read and decode audio. The stream of batches does not depend on it."""

    max_bad_fraction: float = Field(default=0.05, ge=0, le=1)
    """The run ends when more than this share of the samples seen so far could not be used."""

    max_bad_in_a_row: int = Field(default=100, gt=0)
    """The run ends when more samples than this were unusable since the last step with a usable one."""

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
        """The patterns of each training set."""
        return {name: one.shards for name, one in self.sets.items()} or {"all": self.shards}

    @property
    def mixes_sets(self) -> bool:
        """Whether sets have shares of their own, or languages have shares inside each set."""
        weighted = any(one.weight for one in self.sets.values())
        return len(self.sets) > 1 and (weighted or self.set_temperature != 1 or self.mixes_languages)

    @property
    def mixes_languages(self) -> bool:
        """Whether languages have other shares than what the sets hold of them."""
        return self.language_temperature != 1

    def set_weight(self, name: str, duration_seconds: float) -> float:
        """The share of a set that holds so much audio, relative to the other sets."""
        weight = self.sets[name].weight if name in self.sets else None
        return duration_seconds ** (1 / self.set_temperature) if weight is None else weight

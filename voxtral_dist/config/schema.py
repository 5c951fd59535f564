"""The configuration of a run: a tree of frozen models, from YAML and dotted overrides, checked before a GPU is used.

Unknown keys are errors that name the nearest known key. The resolved tree is stored with the run as `config.yaml`, and
`voxtral-dist config schema` prints its JSON schema for editors.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_extra_types.language_code import LanguageAlpha2

from voxtral_dist.errors import UserError, lower_first


class Section(BaseModel):
    """A part of the configuration: immutable, with no unknown keys, documented field by field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Argument = float | int | str | bool
TextStep = Literal["lower_case", "no_punctuation"]
Component = Literal["encoder", "projector", "language_model"]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]


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


def _sorted_set(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(sorted(set(values)))


class ActivationCheckpointingConfig(Section):
    """Blocks that keep only their input in the forward pass and compute the rest again in the backward pass.

    About a third more computation for such a block, and activation memory of one block instead of all.
    """

    encoder: int = Field(default=0, ge=0)
    """Every n-th block of the encoder: 1 takes all of them, 2 every other one, 0 none."""

    language_model: int = Field(default=0, ge=0)
    """Every n-th block of the language model."""


class ModelConfig(Section):
    """Which Voxtral is trained, and in which precision."""

    path: str
    """A Hugging Face folder or hub name of a Voxtral checkpoint: weights, `tekken.json` and processor files."""

    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the weights in forward and backward passes. The optimizer's own copy is float32 in any case. `float16` is for
    GPUs without bfloat16: its loss is scaled, and steps whose gradients overflow are left out."""

    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention kernel. `flash_attention_2` needs the package flash-attn, a GPU and half precision; `auto` takes it
    where it is there, and torch's `sdpa` elsewhere. What is used is said at the start."""

    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    """Which blocks trade computation for memory."""

    compile_blocks: bool = False
    """Compile each block by `torch.compile`: minutes at the start, and less memory traffic after. Not under ZeRO-3,
    whose hooks inside of blocks leave nothing to fuse."""

    loss_chunk_tokens: int = Field(default=2048, gt=0)
    """Target tokens whose logits over the vocabulary are computed at a time, and again in the backward pass: the memory
    of the loss does not grow with the batch."""

    encoder_windows_per_pass: int = Field(default=16, gt=0)
    """Windows (30 s each) that the encoder takes at a time. Micro-batches with more of them on some rank go through it
    in several passes, each computed again in the backward pass: its memory does not grow with the length of clips."""


class LoraConfig(Section):
    """Low-rank adapters (LoRA: Hu et al., arXiv 2106.09685) by the package peft, beside weights that are frozen."""

    rank: int = Field(default=16, gt=0)
    """Of the two matrices of an adapter."""

    alpha: float = Field(default=32.0, gt=0)
    """The adapter's output is scaled by `alpha / rank`."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the adapter's input."""

    use_dora: bool = False
    """Train the magnitudes of the weight's columns too (DoRA: Liu et al., arXiv 2402.09353)."""

    targets: dict[Component, tuple[str, ...]] = Field(
        default={"language_model": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
        min_length=1,
    )
    """Names of the linear layers that get adapters, by component. The encoder has `q_proj`, `k_proj`, `v_proj`,
    `out_proj`, `fc1` and `fc2`; the projector `linear_1` and `linear_2`."""

    trained_whole: Annotated[tuple[Component, ...], AfterValidator(_sorted_set)] = ()
    """Components whose own weights are trained beside the adapters. All others are frozen."""

    @model_validator(mode="after")
    def _is_either(self) -> Self:
        for component in self.trained_whole:
            if component in self.targets:
                raise ValueError(
                    f"`trainable.lora`: `{component}` must be in `targets` or `trained_whole`, but is in both instead"
                )
        return self


class TrainableConfig(Section):
    """Which parameters are trained; the table of them is printed at the start. Default: all."""

    frozen: tuple[str, ...] = ()
    """Components (`encoder`, `projector`, `language_model`) and patterns of parameter names with `*`, such as
    `*.embed_tokens.*`, that keep their weights. A pattern that fits no parameter is refused."""

    lora: LoraConfig | None = None
    """Train adapters instead of weights."""


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

    sort_window_steps: int = Field(default=16, gt=0)
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

    languages: Annotated[tuple[LanguageAlpha2, ...], AfterValidator(_sorted_set)] | None = None
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

    too_long: Literal["leave_out", "refuse"] = "leave_out"
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


class OptimizerConfig(Section):
    """The optimizer and its learning rate over the steps."""

    algorithm: Literal["adamw", "muon"] = "adamw"
    """`adamw` (Loshchilov and Hutter, arXiv 1711.05101), fused on GPUs and DeepSpeed's own on the CPU under offload;
    `muon` updates the matrices of blocks by DeepSpeed's Muon and all else by AdamW: ZeRO-3 alone, without clipping."""

    learning_rate: float = Field(gt=0)
    """The peak, reached after `warmup_steps`."""

    component_learning_rates: dict[Component, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Other peaks for some components, which warm up and fall in the same proportion."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    """Decay rates of the running means of the gradient and of its square."""

    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean square."""

    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled; not applied to norms, biases and embeddings."""

    warmup_steps: int = Field(default=100, ge=0)
    """Steps of linear growth from zero."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """The way from the peak to `final_learning_rate_fraction` of it at the last step."""

    final_learning_rate_fraction: float = Field(default=0.1, ge=0, le=1)
    """What is left of the peak at the end. Does nothing with `schedule: constant`."""

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this global L2 norm. 0 switches clipping off."""


class Fsdp2Config(Section):
    """torch's `fully_shard` (FSDP2): weights, gradients and optimizer states are sharded over ranks, block by block."""

    reshard_after_forward: bool = True
    """Give gathered weights back after each block's forward pass, as ZeRO-3 does. False keeps them until the backward
    pass: one gather less, and memory for the whole model, as under ZeRO-2."""

    ranks_per_replica: int | None = Field(default=None, gt=0)
    """Ranks that share one copy of the model (hybrid sharding), such as the GPUs of a node: weights then travel inside
    nodes alone. Must divide the number of ranks. None: all ranks share one."""

    reduce_precision: Literal["float32", "bfloat16"] = "float32"
    """Of gradients while they are summed over ranks."""

    cpu_offload: bool = False
    """Keep weights, gradients and optimizer states in host memory, where the update is computed too."""


class EngineConfig(Section):
    """What shards and updates the model: DeepSpeed or FSDP2."""

    deepspeed: Path | None = None
    """DeepSpeed's own file, such as `ds_configs/zero3.json`. Batch size, accumulation, precision, optimizer and
    clipping belong to this configuration; a file that sets one of them too is refused."""

    nvme_dir: Path | None = None
    """A folder on a local drive of each node for what DeepSpeed's file offloads to `nvme` without an `nvme_path` of its
    own. What lies there is of no use after the run; checkpoints hold it too."""

    fsdp2: Fsdp2Config | None = None
    """FSDP2 instead; `{}` takes its defaults."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.deepspeed is None) == (self.fsdp2 is None):
            has = "none" if self.deepspeed is None else "both"
            raise ValueError(f"`engine` must have either `engine.deepspeed` or `engine.fsdp2`, but has {has} instead")
        return self


class CheckpointConfig(Section):
    """When the whole state of the run is written, and how many of these are kept."""

    every_steps: int = Field(default=500, gt=0)
    """A checkpoint is also written at the last step and when the run is asked to stop (SIGTERM)."""

    keep: int = Field(default=2, gt=0)
    """Complete checkpoints that stay on disk; older ones are removed after a newer one is complete."""


class TestContextConfig(Section):
    """Lists of words in the prompts of a test set, which is decoded once without a list and once with each size.

    The list of an utterance has all words of the file that its reference holds, and distractors (Le et al., arXiv
    2104.02194). Results are those of NAME, and of `NAME-distractors-N` for each size.
    """

    words: Path
    """As `train_data.context.words`. Their error rate in references is the B-WER, that of all other words the U-WER."""

    num_distractors: Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(_sorted_set)] = (0, 100)
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


class MetricsConfig(Section):
    """What is recorded of a run besides `metrics.jsonl`."""

    tensorboard: bool = True
    """Write scalars to `run_dir/tensorboard`, where the package tensorboard is installed."""

    peak_tflops: float | None = Field(default=None, gt=0)
    """Dense 10^12 operations per second of one rank's device in the model's precision, which the model FLOPs
    utilisation is measured against. None: the data sheet's figure where the device is known, else no utilisation."""


class RunConfig(Section):
    """Everything that determines a run."""

    run_dir: Path
    """Checkpoints, metrics, evaluations and the exported model go here. Starting again with the same folder resumes."""

    num_steps: int = Field(gt=0)
    """Optimizer updates in total."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the order of the data, of augmentation and of dropout."""

    model: ModelConfig
    trainable: TrainableConfig = TrainableConfig()
    train_data: TrainDataConfig
    storage: StorageConfig = StorageConfig()
    optimizer: OptimizerConfig
    engine: EngineConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.optimizer.warmup_steps >= self.num_steps:
            raise ValueError(
                f"`optimizer.warmup_steps` must be smaller than `num_steps` ({self.num_steps}), but is "
                f"{self.optimizer.warmup_steps} instead"
            )
        return self


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration from a YAML file and `section.key=value` overrides (values are YAML).

    Raises:
        UserError: no file, no YAML, an unknown key, or a value out of its range; the sentence names the key.
    """
    if path is None:
        raise UserError("No configuration was given: pass `--config FILE`, for example launch/recipes/demo.yaml.")
    tree = read_yaml(path)
    for override in overrides:
        _apply_override(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(_sentences(error))) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"The configuration {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"The configuration {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, dict):
        raise UserError(f"The configuration {path} must be a mapping of keys to values, but is {_kind(tree)} instead.")
    return tree


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_schema() -> str:
    """The JSON schema of `RunConfig`, for completion and checks in editors."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise UserError(
            f"`--set {override}` must be of the form section.key=value, such as optimizer.learning_rate=1e-5."
        )
    *parents, leaf = dotted.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"`--set {override}`: `{parent}` holds {_kind(child)}, so it has no key `{leaf}`.")
        tree = child
    try:
        # YAML 1.1 reads 1e-5 as text because it lacks a dot; pydantic turns such text into a number where one is due.
        tree[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"`--set {override}`: the value is not valid YAML.") from error


def _sentences(error: ValidationError) -> Iterator[str]:
    for detail in error.errors():
        location = ".".join(str(part) for part in detail["loc"])
        match detail["type"]:
            case "extra_forbidden":
                yield _unknown_key(detail)
            case "missing":
                yield f"`{location}` is missing"
            case "value_error":
                yield detail["msg"].removeprefix("Value error, ")
            case _:
                yield f"`{location}`: {lower_first(detail['msg'])}, but is {detail['input']!r} instead"


def _unknown_key(detail: ErrorDetails) -> str:
    *parents, key = (str(part) for part in detail["loc"])
    known = _known_keys(parents)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean `{nearest[0]}`?" if nearest else f"known keys are {', '.join(known)}"
    place = ".".join([*parents, key])
    return f"`{place}` is not a known key; {hint}"


def _known_keys(parents: Sequence[str]) -> list[str]:
    """The keys of the section that the path of an error leads to, through lists and mappings of sections."""
    section: type[BaseModel] = RunConfig
    for part in parents:
        field = section.model_fields.get(part)
        if field is not None:
            section = _section_in(field.annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_section_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((section for section in found if section is not None), None)


def _kind(value: Any) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"

"""The word error rate of one checkpoint on shard folders, and transcripts of single files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from voxtral_dist.checkpoint import config_of_checkpoint, is_checkpoint, load_checkpoint
from voxtral_dist.config import EvaluationConfig, ModelConfig, TestContextConfig, TestSetConfig, TextStep
from voxtral_dist.data.audio import AudioError, decode_audio, to_pcm
from voxtral_dist.data.context import WordList, context_text
from voxtral_dist.data.features import LogMel
from voxtral_dist.data.prompts import VoxtralPrompts
from voxtral_dist.data.samples import Example
from voxtral_dist.data.storage import is_remote
from voxtral_dist.distributed.world import World
from voxtral_dist.engine.encoder import EncoderPasses
from voxtral_dist.errors import UserError
from voxtral_dist.evaluation.normalizer import normalizer
from voxtral_dist.evaluation.report import TestSetScore
from voxtral_dist.evaluation.test_sets import build_test_sets, evaluate_test_set
from voxtral_dist.evaluation.transcribe import MIN_NEW_TOKENS, Hypothesis, Transcriber
from voxtral_dist.model import load_for_inference

_WINDOWS_PER_PASS: int = ModelConfig.model_fields["encoder_windows_per_pass"].default


@dataclass(frozen=True)
class EvaluationOptions:
    """How shard folders are decoded and scored; see `TestSetConfig` and `TrainDataConfig.target_text`."""

    settings: EvaluationConfig = field(default_factory=EvaluationConfig)
    detect_language: bool = False
    context: TestContextConfig | None = None
    target_text: tuple[TextStep, ...] = ()


@dataclass(frozen=True)
class Question:
    """What the model is asked about files.

    language: of the speech; None asks the model to detect it. context: see `data.context`. instruction: asked instead
    of a transcript.
    """

    language: str | None = None
    context: str = ""
    instruction: str | None = None

    @classmethod
    def of(
        cls, language: str | None, words: Path | None, previous_text: str | None, instruction: str | None
    ) -> Question:
        """A question with all words of a file in its context.

        Raises:
            UserError: the file cannot be read, or an instruction comes with what belongs to transcription alone.
        """
        if instruction is not None and (language or words or previous_text):
            raise UserError(
                "`--instruction` asks something else than a transcript: leave out `--language`, `--words` and "
                "`--previous-text`, and say all in the instruction."
            )
        listed = WordList.read(words, "--words").entries if words else ()
        return cls(language, context_text(listed, previous_text or ""), instruction)


def evaluate(
    model_path: str, shards: Sequence[str], options: EvaluationOptions, precision: str, out_dir: Path, world: World
) -> Iterator[tuple[str, TestSetScore]]:
    """Name and score of each shard folder in turn; details are written to `out_dir`.

    Raises:
        UserError: two folders have the same name, so that the results of one would replace the other's.
    """
    test_sets = {
        _set_name(folder): TestSetConfig(
            shards=folder, detect_language=options.detect_language, context=options.context
        )
        for folder in shards
    }
    if len(test_sets) < len(shards):
        raise UserError("Two of the shard folders have the same name, which names their results: evaluate them apart.")
    named = options.settings.model_copy(update={"test_sets": test_sets})
    prompts = VoxtralPrompts.from_pretrained(_processor_path(model_path))
    built = build_test_sets(named, prompts)
    # Before the model is loaded: it may be refused.
    used = normalizer(named.normalizer, options.target_text)
    transcriber = load_transcriber(model_path, prompts, named, precision, world)
    for test_set in built:
        yield test_set.name, evaluate_test_set(test_set, transcriber, named, used, out_dir, world)


def _set_name(shards: str) -> str:
    """The last part of a folder or URL."""
    return shards.rstrip("/").rpartition("/")[2] if is_remote(shards) else Path(shards).resolve().name


def transcribe_files(
    model_path: str,
    clips: Sequence[Path],
    question: Question,
    settings: EvaluationConfig,
    precision: str,
    world: World,
) -> Iterator[tuple[Path, Hypothesis]]:
    """Each clip with its transcript or answer, one after the other.

    Raises:
        UserError: a clip is missing, does not decode, or is too long for the model.
    """
    prompts = VoxtralPrompts.from_pretrained(_processor_path(model_path))
    examples = [clip_example(clip, question, prompts) for clip in clips]
    transcriber = load_transcriber(model_path, prompts, settings, precision, world)
    for clip, example in zip(clips, examples, strict=True):
        yield clip, transcriber([example])[0]


def load_transcriber(
    model_path: str, prompts: VoxtralPrompts, settings: EvaluationConfig, precision: str, world: World
) -> Transcriber:
    """A model folder, or a checkpoint of a run, ready to decode on this rank's device."""
    load = load_checkpoint if is_checkpoint(model_path) else load_for_inference
    model = load(model_path, world.device, precision)
    EncoderPasses(model, _WINDOWS_PER_PASS)
    log_mel = LogMel.from_pretrained(_processor_path(model_path), world.device)
    return Transcriber(model, prompts, log_mel, settings)


def _processor_path(model_path: str) -> str:
    """Where tokenizer and features are described: a checkpoint of a run has them where the run began."""
    return config_of_checkpoint(Path(model_path)).model.path if is_checkpoint(model_path) else model_path


def clip_example(clip: Path, question: Question, prompts: VoxtralPrompts) -> Example:
    """An audio file as an example without a reference."""
    try:
        waveform = decode_audio(clip.read_bytes(), prompts.sampling_rate)
        num_windows = prompts.num_windows(len(waveform))
        if question.instruction is None:
            prompt = prompts.transcription(question.language, num_windows, question.context)
        else:
            prompt = prompts.instruction(question.instruction, num_windows)
    except OSError as error:
        raise UserError(f"The clip {clip} cannot be read: {error.strerror}.") from error
    except (AudioError, ValueError) as error:
        raise UserError(f"The clip {clip} {error}.") from error
    duration_seconds = len(waveform) / prompts.sampling_rate
    if len(prompt) + MIN_NEW_TOKENS > prompts.max_positions:
        raise UserError(
            f"The clip {clip} lasts {duration_seconds:.0f} s, and its prompt takes {len(prompt)} of the model's "
            f"{prompts.max_positions} positions, which leaves no room for an answer: cut it into shorter clips, or "
            "tell fewer words."
        )
    return Example(
        sample_id=0,
        key=clip.stem,
        pcm=to_pcm(waveform),
        num_windows=num_windows,
        prompt=prompt,
        completion=(prompts.eos_id,),
        reference="",
        duration_seconds=duration_seconds,
        is_transcription=question.instruction is None,
        is_untagged=question.language is None,
        context=question.context,
    )

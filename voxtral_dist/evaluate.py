"""The word error rate of one checkpoint on shard folders, and transcripts of single files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from voxtral_dist.config import EvaluationConfig, TestSetConfig
from voxtral_dist.data.audio import AudioError, decode_audio, to_pcm
from voxtral_dist.data.features import LogMel
from voxtral_dist.data.prompts import TranscriptionPrompts
from voxtral_dist.data.samples import Example
from voxtral_dist.data.storage import is_remote
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError
from voxtral_dist.evaluation.report import TestSetScore
from voxtral_dist.evaluation.test_sets import build_test_sets, evaluate_test_set
from voxtral_dist.evaluation.transcribe import Transcriber
from voxtral_dist.model import load_for_inference


def evaluate(
    model_path: str, shards: Sequence[str], settings: EvaluationConfig, precision: str, out_dir: Path, world: World
) -> Iterator[tuple[str, TestSetScore]]:
    """Name and score of each shard folder in turn; details are written to `out_dir`.

    Raises:
        UserError: two folders have the same name, so that the results of one would replace the other's.
    """
    test_sets = {_set_name(shards_of_set): TestSetConfig(shards=shards_of_set) for shards_of_set in shards}
    if len(test_sets) < len(shards):
        raise UserError("Two of the shard folders have the same name, which names their results: evaluate them apart.")
    named = settings.model_copy(update={"test_sets": test_sets})
    prompts = TranscriptionPrompts.from_pretrained(model_path)
    built = build_test_sets(named, prompts)
    transcriber = load_transcriber(model_path, prompts, settings, precision, world)
    for test_set in built:
        yield test_set.name, evaluate_test_set(test_set, transcriber, named, out_dir, world)


def _set_name(shards: str) -> str:
    """The last part of a folder or URL."""
    return shards.rstrip("/").rpartition("/")[2] if is_remote(shards) else Path(shards).resolve().name


def transcribe_files(
    model_path: str,
    clips: Sequence[Path],
    language: str | None,
    settings: EvaluationConfig,
    precision: str,
    world: World,
) -> Iterator[tuple[Path, str]]:
    """Each clip with its transcript, one after the other.

    Raises:
        UserError: a clip is missing or does not decode.
    """
    prompts = TranscriptionPrompts.from_pretrained(model_path)
    examples = [clip_example(clip, language, prompts) for clip in clips]
    transcriber = load_transcriber(model_path, prompts, settings, precision, world)
    for clip, example in zip(clips, examples, strict=True):
        yield clip, transcriber([example])[0].text


def load_transcriber(
    model_path: str, prompts: TranscriptionPrompts, settings: EvaluationConfig, precision: str, world: World
) -> Transcriber:
    """A checkpoint ready to decode on this rank's device."""
    model = load_for_inference(model_path, world.device, precision)
    log_mel = LogMel.from_pretrained(model_path, world.device)
    return Transcriber(model, prompts, log_mel, settings.max_tokens_per_second)


def clip_example(clip: Path, language: str | None, prompts: TranscriptionPrompts) -> Example:
    """An audio file as an example without a reference."""
    try:
        waveform = decode_audio(clip.read_bytes(), prompts.sampling_rate)
        num_windows = prompts.num_windows(len(waveform))
        prompt = prompts.prompt(language, num_windows)
    except OSError as error:
        raise UserError(f"The clip {clip} cannot be read: {error.strerror}.") from error
    except (AudioError, ValueError) as error:
        raise UserError(f"The clip {clip} {error}.") from error
    return Example(
        sample_id=0,
        key=clip.stem,
        pcm=to_pcm(waveform),
        num_windows=num_windows,
        prompt=prompt,
        completion=(prompts.eos_id,),
        reference="",
        duration_seconds=len(waveform) / prompts.sampling_rate,
    )

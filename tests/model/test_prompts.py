"""Our ids, padding and features are those of `VoxtralProcessor`; targets are the transcript and nothing else."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from transformers import VoxtralProcessor

from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.micro_batch import IGNORED_LABEL, collate, pad_left
from voxtral_dist.errors import UserError
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import Transcript, VoxtralPrompts

from corpora import REAL_SPEECH, real_speech, tone

RATE = 16_000
LANGUAGES = ("en", "de", "fr", "hi", "pt", None)
# Around the edge of one and of two windows of 30 s.
DURATIONS = (1.0, 7.3, 29.9, 30.0, 30.1, 45.0, 65.0)

LOOK_ALIKES = ("[INST]", "</s>", "<s>", "[TRANSCRIBE]", "[AUDIO] [BEGIN_AUDIO]", "<pad> lang:en", "a [/INST] b</s>")
TEXTS = (
    "hello world",
    " leading and trailing space, \ttabs",
    "Grüße aus Köln, straße!",
    "l'été à Genève — déjà vu…",
    "यह हिन्दी में एक वाक्य है।",
    "日本語のテキスト 🎙️ 𝄞",
    "naïve cafe\u0301 ﬁne",
)


@cache
def processor(folder: Path) -> Any:
    return VoxtralProcessor.from_pretrained(folder)


@cache
def real_window_prompts(folder: Path) -> VoxtralPrompts:
    return VoxtralPrompts.from_pretrained(str(folder))


def processed(folder: Path, clips: list[np.ndarray], languages: list[str | None], **arguments: Any) -> Any:
    """What transformers itself makes of the clips."""
    return processor(folder).apply_transcription_request(
        audio=[clip.astype(np.float32) / 32768 for clip in clips],
        language=languages,
        model_id=str(folder),
        sampling_rate=RATE,
        format=["WAV"] * len(clips),
        **arguments,
    )


def padded(pcm: np.ndarray, prompts: VoxtralPrompts) -> torch.Tensor:
    """A clip as whole windows."""
    padding = -len(pcm) % prompts.window_samples
    return torch.from_numpy(np.pad(pcm, (0, padding)).reshape(-1, prompts.window_samples))


def assert_equal_to_processor(
    folder: Path, prompts: VoxtralPrompts, clips: list[np.ndarray], languages: list[str | None], **arguments: Any
) -> None:
    expected = processed(folder, clips, languages, **arguments)
    windows = [prompts.num_windows(len(clip)) for clip in clips]
    ids = [prompts.transcription(language, count) for language, count in zip(languages, windows, strict=True)]
    input_ids, attention_mask = pad_left(ids, prompts.pad_id)
    assert torch.equal(input_ids, expected["input_ids"])
    assert torch.equal(attention_mask, expected["attention_mask"])
    assert (input_ids == processor(folder).tokenizer.convert_tokens_to_ids("[AUDIO]")).sum() == (
        prompts.audio_tokens_per_window * sum(windows)
    )

    pcm = torch.cat([padded(clip, prompts) for clip in clips])
    features = LogMel.from_pretrained(str(folder), torch.device("cpu"))(pcm, windows)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected["input_features"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("language", LANGUAGES)
def test_ids_padding_and_features_equal_the_processors(real_window_model, language):
    clips = [tone(duration_seconds, seed=number) for number, duration_seconds in enumerate(DURATIONS)]
    prompts = real_window_prompts(real_window_model)
    assert_equal_to_processor(real_window_model, prompts, clips, [language] * len(clips))


def test_a_batch_of_several_languages_equals_the_processors(real_window_model):
    clips = [tone(0.5 + number, seed=number) for number in range(len(LANGUAGES))]
    assert_equal_to_processor(real_window_model, real_window_prompts(real_window_model), clips, list(LANGUAGES))


@pytest.mark.skipif(not REAL_SPEECH.is_dir(), reason="the real speech in ../shared/data is absent")
def test_real_speech_equals_the_processors(real_window_model):
    clips = [real_speech(3.0), real_speech(31.0), real_speech(12.0)[RATE:], real_speech(125.0)]
    assert_equal_to_processor(
        real_window_model, real_window_prompts(real_window_model), clips, ["en", None, "fr", "de"]
    )


def test_a_short_window_equals_the_processors(tiny_model, prompts):
    clips = [tone(seconds, seed=number) for number, seconds in enumerate((0.3, 1.28, 1.29, 3.0, 2.56))]
    frames = prompts.window_samples // 160
    sizes = {"pad_to_multiple_of": prompts.window_samples, "max_source_positions": frames}
    assert_equal_to_processor(tiny_model, prompts, clips, ["en", None, "de", "en", "fr"], audio_kwargs=sizes)


def test_features_of_a_clip_do_not_depend_on_its_batch(tiny_model, prompts):
    log_mel = LogMel.from_pretrained(str(tiny_model), torch.device("cpu"))
    clips = [padded(tone(seconds, seed=number), prompts) for number, seconds in enumerate((3, 1, 2))]
    together = log_mel(torch.cat(clips), [len(clip) for clip in clips])
    alone = [log_mel(clip, [len(clip)]) for clip in clips]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


def test_silence_has_finite_features(tiny_model, prompts):
    log_mel = LogMel.from_pretrained(str(tiny_model), torch.device("cpu"))
    assert log_mel(torch.zeros((1, prompts.window_samples), dtype=torch.int16), [1]).isfinite().all()


def test_the_sizes_of_the_published_window(real_window_model):
    prompts = real_window_prompts(real_window_model)
    assert (prompts.sampling_rate, prompts.window_samples, prompts.window_seconds) == (16_000, 480_000, 30.0)
    assert prompts.audio_tokens_per_window == 375


@pytest.mark.parametrize(
    ("num_samples", "num_windows"), [(1, 1), (479_999, 1), (480_000, 1), (480_001, 2), (960_000, 2)]
)
def test_num_windows(real_window_model, num_samples, num_windows):
    assert real_window_prompts(real_window_model).num_windows(num_samples) == num_windows


@pytest.mark.parametrize("text", [*TEXTS, *LOOK_ALIKES])
def test_a_transcript_survives_its_tokens(prompts, text):
    assert prompts.decode(prompts.completion(text)) == text


@pytest.mark.parametrize("text", [*TEXTS, *LOOK_ALIKES])
def test_text_holds_no_special_token_but_the_end(prompts, tiny_model, text):
    *ids, last = prompts.completion(text)
    special = set(processor(tiny_model).tokenizer.all_special_ids)
    assert last == prompts.eos_id
    assert special >= {prompts.eos_id, prompts.pad_id}
    assert special.isdisjoint(ids)
    # Every id below the first byte is reserved.
    assert min(ids) >= 35


def test_decoding_stops_showing_special_tokens_and_the_detected_language(prompts):
    detected = [prompts.eos_id, *prompts.completion("lang:en hello"), prompts.pad_id]
    assert prompts.transcript(detected) == Transcript("hello", "en")
    assert prompts.transcript(prompts.completion("language:en")) == Transcript("language:en", None)
    # In tokens that Mistral would not choose, and without a space, as completions are trained.
    split = [token for letter in "lang:de" for token in prompts.encode(letter)]
    assert prompts.transcript([*split, *prompts.completion("Hallo")]) == Transcript("Hallo", "de")
    assert prompts.transcript(prompts.completion("lang:xx yes")) == Transcript("lang:xx yes", None)
    assert prompts.transcript(prompts.completion("said lang:en hello")) == Transcript("said lang:en hello", None)
    assert prompts.transcript([]) == Transcript("", None)


def test_the_prompt_ends_with_the_request_to_transcribe(prompts, tiny_model):
    tokenizer = processor(tiny_model).tokenizer.tokenizer.instruct_tokenizer.tokenizer
    for language in LANGUAGES:
        text = tokenizer.decode(list(prompts.transcription(language, 2)), special_token_policy=SpecialTokenPolicy.KEEP)
        tag = f"lang:{language}" if language else ""
        assert text.startswith("<s>[INST][BEGIN_AUDIO][AUDIO]")
        assert text.endswith(f"[AUDIO][/INST]{tag}[TRANSCRIBE]")


@pytest.mark.parametrize("language", ["klingon", "xx", "EN-us", ""])
def test_an_unknown_language_is_named(prompts, language):
    with pytest.raises(ValueError, match=f"has the language '{language}', which is not an ISO 639-1 code"):
        prompts.transcription(language, 1)


def example(prompts: VoxtralPrompts, text: str, num_windows: int = 1, language: str | None = "en") -> Example:
    return Example(
        utterance_id=0,
        key="clip",
        pcm=np.zeros(num_windows * prompts.window_samples, dtype=np.int16),
        num_windows=num_windows,
        prompt=prompts.transcription(language, num_windows),
        completion=tuple(prompts.completion(text)),
        reference=text,
        duration_seconds=1.0,
    )


def test_each_label_is_the_next_token_and_the_prompt_has_none(prompts):
    examples = [example(prompts, "short"), example(prompts, "a longer one", 2, None), example(prompts, "mid dle", 3)]
    batch = collate(examples, prompts)
    rows = zip(examples, batch.input_ids, batch.positions_per_example, batch.labels, strict=True)
    for one, ids, length, labels in rows:
        sequence = torch.tensor([*one.prompt, *one.completion])
        # The last input token is the one before </s>.
        assert torch.equal(ids[:length], sequence[:-1])
        assert (ids[length:] == prompts.pad_id).all()
        assert labels[length - 1] == prompts.eos_id
        following = torch.cat([sequence[1:], ids[length:]])
        counted = labels != IGNORED_LABEL
        assert counted.sum() == len(one.completion)
        assert torch.equal(labels[counted], following[counted])
        assert counted.nonzero().min() == length - len(one.completion)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / "tekken.json").unlink(), "has no tekken.json"),
        (lambda folder: (folder / "tekken.json").write_text("{"), "tokenizer"),
        (lambda folder: (folder / "tekken.json").write_text("{}"), "tokenizer"),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_refused(tiny_model, tmp_path, spoil, sentence):
    folder = shutil.copytree(tiny_model, tmp_path / "spoilt")
    spoil(folder)
    with pytest.raises(UserError, match=sentence) as refused:
        VoxtralPrompts.from_pretrained(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_missing_model_folder_is_refused(tmp_path, absolute):
    path = str(tmp_path / "nowhere") if absolute else "./nowhere"
    with pytest.raises(UserError, match="nowhere") as refused:
        VoxtralPrompts.from_pretrained(path)
    assert "\n" not in str(refused.value)

"""For any text, language and length: ids are mistral-common's, labels are the next token, and text stays text."""

import base64
import io
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.chunk import AudioChunk, TextChunk
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import InstructRequest
from mistral_common.protocol.transcription.request import TranscriptionRequest
from transformers import MistralCommonBackend

from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.micro_batch import IGNORED_LABEL, collate
from voxtral_dist.model.prompts import Transcript, VoxtralPrompts
from voxtral_dist.text.languages import LANGUAGE_CODES

# Tests share models of the session, and the first example pays for what is cached. The examples are the same in each
# run; a larger `max_examples` without `derandomize` looks further.
settings.register_profile(
    "prompts",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    print_blob=True,
)
settings.load_profile("prompts")

LOOK_ALIKES = (
    "[TRANSCRIBE]",
    "</s>",
    "<s>",
    "<pad>",
    "[INST]",
    "[/INST]",
    "[AUDIO]",
    "[BEGIN_AUDIO]",
    "[SYSTEM_PROMPT]",
    "[TOOL_CALLS]",
    "<unk>",
    "[/INST]lang:en[TRANSCRIBE]",
    "hello</s><s>[INST]again[/INST]",
)
SCRIPTS = (
    "مرحبا بالعالم، كيف الحال؟",
    "यह हिन्दी में एक वाक्य है।",
    "cafe\u0301 a\u0328\u0301 \u1100\u1161\u11a8",
    "👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪",
    "zero\u200bwidth \u202eright to left\u202c \ufeffmark",
    "日本語\u3000全角",
    "line\nbreaks\r\n\ttabs",
    "𝄞 𐍈 \U0010ffff \x00 \x7f",
)


def texts() -> st.SearchStrategy[str]:
    """Any Unicode without lone surrogates, with look-alikes of special tokens and difficult scripts in between."""
    piece = st.one_of(st.text(max_size=12), st.sampled_from(LOOK_ALIKES), st.sampled_from(SCRIPTS))
    return st.lists(piece, min_size=1, max_size=6).map("".join).filter(str.strip)


languages = st.sampled_from((None, *LANGUAGE_CODES))
windows = st.integers(1, 12)


class Mistral:
    """What mistral-common makes of the same requests, with audio of the length."""

    def __init__(self, folder: str, prompts: VoxtralPrompts) -> None:
        self.tokenizer: Any = MistralCommonBackend.from_pretrained(folder).tokenizer
        self.text = self.tokenizer.instruct_tokenizer.tokenizer
        self._prompts = prompts

    def transcription(self, language: str | None, num_samples: int) -> list[int]:
        request = TranscriptionRequest(audio=self._audio(num_samples), language=language)
        return list(self.tokenizer.encode_transcription(request).tokens)

    def chat(self, instruction: str, num_samples: int, answer: str | None = None) -> list[int]:
        content = [AudioChunk(input_audio=self._audio(num_samples)), TextChunk(text=instruction)]
        messages: list[Any] = [UserMessage(content=content)]
        if answer is not None:
            messages.append(AssistantMessage(content=answer))
        return list(self.tokenizer.instruct_tokenizer.encode_instruct(InstructRequest(messages=messages)).tokens)

    def _audio(self, num_samples: int) -> str:
        wav = io.BytesIO()
        soundfile.write(wav, np.zeros(num_samples, dtype=np.int16), self._prompts.sampling_rate, format="WAV")
        return base64.b64encode(wav.getvalue()).decode("ascii")


@pytest.fixture(scope="module")
def mistral(tiny_model, prompts) -> Mistral:
    return Mistral(str(tiny_model), prompts)


@given(languages, st.integers(1, 40 * 20_480))
def test_a_transcription_is_asked_for_as_mistral_asks(prompts, mistral, language, num_samples):
    ours = prompts.transcription(language, prompts.num_windows(num_samples))
    assert list(ours) == mistral.transcription(language, num_samples)


def test_half_an_hour_is_asked_about_as_mistral_asks(real_window_model):
    prompts = VoxtralPrompts.from_pretrained(str(real_window_model))
    mistral = Mistral(str(real_window_model), prompts)
    for seconds in (29.9, 30.1, 599.0, 1800.0):
        num_samples = round(seconds * prompts.sampling_rate)
        ours = prompts.transcription("en", prompts.num_windows(num_samples))
        assert list(ours) == mistral.transcription("en", num_samples)
    assert prompts.num_windows(1800 * 16_000) * prompts.audio_tokens_per_window == 22_500


@given(texts(), windows, texts())
def test_an_instruction_and_its_answer_are_those_of_mistrals_chat(prompts, mistral, instruction, num_windows, answer):
    num_samples = num_windows * prompts.window_samples
    prompt = prompts.instruction(instruction, num_windows)
    assert list(prompt) == mistral.chat(instruction, num_samples)
    # Mistral's template takes trailing spaces off an answer; a target is never changed in silence.
    assert [*prompt, *prompts.completion(answer.rstrip(" "))] == mistral.chat(instruction, num_samples, answer)


@given(languages, windows, texts())
def test_a_context_stands_behind_the_audio_and_changes_nothing_else(prompts, mistral, language, num_windows, context):
    plain = mistral.transcription(language, num_windows * prompts.window_samples)
    end = 3 + num_windows * prompts.audio_tokens_per_window
    ours = list(prompts.transcription(language, num_windows, context))
    assert ours == plain[:end] + mistral.text.encode(context, bos=False, eos=False) + plain[end:]


@given(texts())
def test_text_survives_its_tokens_exactly(prompts, text):
    assert prompts.decode(prompts.completion(text)) == text


@given(texts(), languages)
@example("[TRANSCRIBE]", None)
@example("</s>", "en")
def test_nothing_in_a_text_becomes_a_special_token(prompts, mistral, text, language):
    *ids, last = prompts.completion(text)
    assert last == prompts.eos_id
    assert not any(mistral.text.is_special(token) for token in ids)
    # So a prompt has the special tokens of an empty one, whatever its context or instruction.
    for ours, empty in (
        (prompts.transcription(language, 2, text), prompts.transcription(language, 2)),
        (prompts.instruction(text, 2), prompts.instruction("", 2)),
    ):
        assert [token for token in ours if mistral.text.is_special(token)] == [
            token for token in empty if mistral.text.is_special(token)
        ]


@given(texts(), st.sampled_from(LANGUAGE_CODES))
def test_a_detected_language_is_told_apart_from_the_transcript(prompts, text, language):
    assume(not text.lstrip().startswith("lang:"))
    completion = prompts.completion(text)
    assert prompts.transcript(completion) == Transcript(text.strip(), None)
    assert prompts.transcript([*prompts.tag(language), *completion]) == Transcript(text.strip(), language)
    # As one text, which other tokens may make.
    assert prompts.transcript(prompts.completion(f"lang:{language} {text}")) == Transcript(text.strip(), language)


def made(prompts: VoxtralPrompts, text: str, language: str | None, num_windows: int, context: str) -> Example:
    return Example(
        utterance_id=0,
        key="clip",
        pcm=np.zeros(num_windows * prompts.window_samples, dtype=np.int16),
        num_windows=num_windows,
        prompt=prompts.transcription(language, num_windows, context),
        completion=tuple(prompts.completion(text)),
        reference=text,
        duration_seconds=1.0,
    )


@given(
    st.lists(st.tuples(texts(), languages, st.integers(1, 3), st.one_of(st.just(""), texts())), min_size=1, max_size=5)
)
def test_labels_are_the_next_token_or_ignored_and_lengths_are_exact(prompts, drawn):
    examples = [made(prompts, *one) for one in drawn]
    batch = collate(examples, prompts)
    rows = zip(examples, batch.input_ids, batch.positions_per_example, batch.labels, strict=True)
    for one, ids, length, labels in rows:
        sequence = [*one.prompt, *one.completion]
        # The whole example but its last token, and padding behind it.
        assert length == len(sequence) - 1
        assert ids[:length].tolist() == sequence[:-1]
        assert (ids[length:] == prompts.pad_id).all()
        following = torch.tensor([*sequence[1:], *ids[length:].tolist()])
        counted = labels != IGNORED_LABEL
        assert torch.equal(labels[counted], following[counted])
        # Exactly the completion counts, up to the last token.
        prompt_length = length - len(one.completion)
        assert counted.nonzero().flatten().tolist() == list(range(prompt_length, length))
        assert prompts.decode(labels[counted].tolist()) == one.reference
    assert batch.num_target_tokens == sum(len(one.completion) for one in examples)

"""One stored utterance: read from its shard, checked, and turned into the ids and windows of an example."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from voxtral_dist.data.examples.bad_utterance import BadUtterance, UtteranceError
from voxtral_dist.data.examples.example import Example, LoadedUtterance
from voxtral_dist.data.examples.prompting import Prompting
from voxtral_dist.data.stored.audio import AudioError, Pcm, Waveform, decode_audio, decode_pcm, to_pcm
from voxtral_dist.data.stored.checks import MAX_CHARS_PER_SECOND, is_same_duration, is_silent, is_too_much_text
from voxtral_dist.data.stored.index import ShardIndex
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.stored.tar_members import read_members
from voxtral_dist.data.stored.utterance import StoredUtterance
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.text.steps import apply_steps

if TYPE_CHECKING:
    from voxtral_dist.data.examples.augmentation import Augmentation


class _TooLongError(ValueError):
    """An example does not fit into the limits of targets or of the model."""


class UtteranceReader:
    """Reads samples of an index by number."""

    def __init__(
        self,
        index: ShardIndex,
        prompts: VoxtralPrompts,
        max_target_tokens: int | None,
        storage: Storage | None = None,
        augmentation: Augmentation | None = None,
        max_chars_per_second: float = MAX_CHARS_PER_SECOND,
        prompting: Prompting | None = None,
        kept_fields: Sequence[str] = (),
        takes_all: bool = False,
    ) -> None:
        """A reader.

        Args:
            index: the samples.
            prompts: makes token ids, and knows the length of windows.
            max_target_tokens: longer transcripts are unusable. None takes any.
            storage: what reads the bytes.
            augmentation: of every clip.
            max_chars_per_second: longer transcripts are unusable.
            prompting: what prompts tell the model, and what targets are made of texts; None tells languages and
                keeps texts.
            kept_fields: keys of the samples' json that examples have too.
            takes_all: also silent clips, transcripts that are longer than that, and texts of which no target is left: a
                test set is scored as it is.
        """
        self._index = index
        self._prompts = prompts
        self._max_target_tokens = max_target_tokens
        self._storage = storage or Storage()
        self._augmentation = augmentation
        self._max_chars_per_second = max_chars_per_second
        self._prompting = prompting or Prompting()
        self._kept_fields = tuple(kept_fields)
        self._takes_all = takes_all

    def prefetch(self, utterance_ids: Sequence[int]) -> None:
        """Start to read what is going to be asked for."""
        self._storage.prefetch([self._index.span(utterance_id) for utterance_id in utterance_ids])

    def shard_name(self, utterance_id: int) -> str:
        """The file that holds a sample."""
        return self._index.shard(utterance_id).name

    def read(self, utterance_id: int) -> StoredUtterance:
        """The stored utterance.

        Raises:
            UtteranceError: the bytes cannot be read, differ from the indexed ones, or are not the tar members of one
                utterance with audio and text.
        """
        span, contents = self._index.span(utterance_id), b""
        try:
            contents = self._storage.read(span)
            return self._index.parse(utterance_id, contents)
        except (OSError, tarfile.TarError, ValueError) as error:
            key = _key_in(contents) or f"#{utterance_id}"
            reason = f"cannot be read at byte {span.offset}: {error}"
            raise UtteranceError(BadUtterance(self.shard_name(utterance_id), key, reason)) from error

    def load(self, utterance_id: int, key: tuple[int, ...] = (), is_packed: bool = False) -> LoadedUtterance:
        """The utterance with decoded, checked and augmented audio.

        Args:
            utterance_id: its number in the index.
            key: (seed, pass), which makes augmentation reproducible.
            is_packed: whether it shares its window with others, so that no augmentation may lengthen it.

        Raises:
            UtteranceError: anything about the sample is unusable; the reason says what.
        """
        sample = self.read(utterance_id)
        try:
            pcm = self._pcm(utterance_id, sample, key, is_packed)
            # An answer is as it is: its case and its marks were asked for.
            steps = self._prompting.target_text if sample.instruction is None else ()
            target = apply_steps(steps, sample.text)
            if not target and not self._takes_all:
                raise ValueError("has no text after the steps of `target_text`")
        except (AudioError, ValueError) as error:
            raise self._unusable(utterance_id, sample.key, error) from error
        return LoadedUtterance(
            utterance_id, sample.key, pcm, sample.text, target, sample.language, sample.instruction, sample.fields
        )

    def example(self, utterance_id: int) -> Example:
        """The utterance as an example of its own.

        Raises:
            UtteranceError: anything about the sample is unusable; the reason says what.
        """
        return self.join([self.load(utterance_id)])

    def join(self, clips: Sequence[LoadedUtterance], key: tuple[int, ...] = ()) -> Example:
        """Utterances of one language as one example: their audio and their texts one after the other.

        Args:
            clips: one or more; a clip with an instruction comes alone.
            key: (seed, pass), which makes what is drawn for the prompt reproducible.

        Raises:
            UtteranceError: the text or the whole example is too long, or the language is none.
        """
        first = clips[0]
        text, target = _joined([clip.text for clip in clips]), _joined([clip.target for clip in clips])
        pcm = np.concatenate([clip.pcm for clip in clips]) if len(clips) > 1 else first.pcm
        example = Example(
            utterance_id=first.utterance_id,
            key=first.key,
            pcm=pcm,
            num_windows=self._prompts.num_windows(len(pcm)),
            prompt=(),
            completion=tuple(self._prompts.completion(target)),
            reference=text,
            duration_seconds=len(pcm) / self._prompts.sampling_rate,
            num_utterances=len(clips),
            is_transcription=first.instruction is None,
            fields={name: first.fields[name] for name in self._kept_fields if name in first.fields},
        )
        try:
            self._check_targets(example)
            example = self._with_prompt(example, clips, target, (*key, first.utterance_id))
            self._check_positions(example)
        except ValueError as error:
            raise self._unusable(first.utterance_id, first.key, error) from error
        return example

    def _with_prompt(
        self, example: Example, clips: Sequence[LoadedUtterance], target: str, key: tuple[int, ...]
    ) -> Example:
        """The example with what it is asked, and with the tag of its language where the model has to find it."""
        first = clips[0]
        if first.instruction is not None:
            return replace(example, prompt=self._prompts.instruction(first.instruction, example.num_windows))
        context = self._prompting.context(target, [clip.fields for clip in clips], key)
        is_untagged = first.language is None or self._prompting.is_untagged(key)
        prompt = self._prompts.transcription(None if is_untagged else first.language, example.num_windows, context)
        tag = self._prompts.tag(first.language) if is_untagged and first.language is not None else ()
        completion = (*tag, *example.completion)
        return replace(example, prompt=prompt, completion=completion, is_untagged=is_untagged, context=context)

    def _check_targets(self, example: Example) -> None:
        if self._max_target_tokens is not None and len(example.completion) > self._max_target_tokens:
            raise _TooLongError(
                f"has {len(example.completion)} target tokens, more than the limit of {self._max_target_tokens}"
            )

    def _check_positions(self, example: Example) -> None:
        # The last token is predicted, and never read.
        num_positions = len(example.prompt) + len(example.completion) - 1
        if num_positions > self._prompts.max_positions:
            raise _TooLongError(
                f"takes {num_positions} positions of the language model, which has {self._prompts.max_positions}"
            )

    def _pcm(self, utterance_id: int, sample: StoredUtterance, key: tuple[int, ...], is_packed: bool) -> Pcm:
        rate = self._prompts.sampling_rate
        if self._augmentation is None:
            pcm = decode_pcm(sample.audio, rate)
            self._check(utterance_id, pcm, sample)
            return pcm
        waveform = decode_audio(sample.audio, rate)
        self._check(utterance_id, waveform, sample)
        windows = self._prompts.num_windows(len(waveform)) * self._prompts.window_samples
        max_samples = len(waveform) if is_packed else windows
        return to_pcm(self._augmentation(waveform, rate, (*key, utterance_id), max_samples))

    def _check(self, utterance_id: int, audio: Waveform | Pcm, sample: StoredUtterance) -> None:
        # Truncated mp3 and wav decode short without an error.
        seconds = len(audio) / self._prompts.sampling_rate
        expected = float(self._index.record(utterance_id)["duration_ms"]) / 1000.0
        if not is_same_duration(seconds, expected):
            raise AudioError(f"decodes to {seconds:.2f} s of audio, but its index says {expected:.2f} s")
        if self._takes_all:
            return
        if is_silent(audio):
            raise AudioError("is silent: it never reaches -60 dB of full scale")
        if sample.instruction is None and is_too_much_text(len(sample.text), seconds, self._max_chars_per_second):
            raise AudioError(f"lasts {seconds:.2f} s, too short for a text of {len(sample.text)} characters")

    def _unusable(self, utterance_id: int, key: str, error: Exception) -> UtteranceError:
        return UtteranceError(
            BadUtterance(self.shard_name(utterance_id), key, str(error), isinstance(error, _TooLongError))
        )


def _joined(texts: Sequence[str]) -> str:
    """One text by itself is as it is."""
    return " ".join(text.strip() for text in texts) if len(texts) > 1 else texts[0]


def _key_in(contents: bytes) -> str | None:
    """The key of damaged members, where their names can still be read."""
    try:
        return read_members(contents)[0] or None
    except (tarfile.TarError, ValueError, OSError):
        return None

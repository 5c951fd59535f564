"""Reading of utterances: from the bytes in a shard to the token ids and audio of an example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from voxtral_dist.data.examples.bad_utterance import BadUtterance, UtteranceError, described
from voxtral_dist.data.examples.example import Example, LoadedUtterance
from voxtral_dist.data.examples.prompting import Prompting
from voxtral_dist.data.examples.reading import read_utterance
from voxtral_dist.data.stored.audio import AudioError, Pcm, Waveform, decode_audio, decode_pcm, to_pcm
from voxtral_dist.data.stored.checks import MAX_CHARS_PER_SECOND, is_same_duration, is_silent, is_too_much_text
from voxtral_dist.data.stored.index import ShardIndex
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.stored.utterance import StoredUtterance
from voxtral_dist.errors import UserError
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.output.counting import counted
from voxtral_dist.text.own_functions import OwnFunctionError
from voxtral_dist.text.steps import apply_steps

if TYPE_CHECKING:
    from voxtral_dist.data.examples.augmentation import Augmentation


class _TooLongError(ValueError):
    """An example exceeds `max_target_tokens` or the positions of the model."""


class UtteranceReader:
    """Reads, checks and augments the utterances of an index by number, and makes examples of them.

    Example:
        >>> from voxtral_dist import UtteranceReader, VoxtralPrompts, read_index
        >>> prompts = VoxtralPrompts.from_pretrained("models/tiny")
        >>> reader = UtteranceReader(read_index(["shards/speech"]), prompts, max_target_tokens=None)
        >>> example = reader.example(0)
        >>> prompts.decode(example.completion)
        'seven green bottles 0'
    """

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
        """Build a reader.

        Args:
            index: the utterances.
            prompts: makes token ids, and knows the sampling rate and the length of windows.
            max_target_tokens: utterances with more target tokens are unusable; None sets no limit.
            storage: reads the bytes; None reads local files and URLs with the default settings.
            augmentation: applied to the audio of every utterance; None for none.
            max_chars_per_second: transcripts with more characters per second of audio are unusable.
            prompting: what prompts tell the model, and how texts become targets; None puts the language into every
                prompt and keeps texts as they are.
            kept_fields: keys of the json that examples keep in `fields`.
            takes_all: accept silent audio, any number of characters per second, and empty targets: a test set is scored
                as it is.
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
        """Start to read the bytes of utterances that will be loaded soon."""
        self._storage.prefetch([self._index.span(utterance_id) for utterance_id in utterance_ids])

    def shard_name(self, utterance_id: int) -> str:
        """The name of the tar that holds an utterance."""
        return self._index.shard(utterance_id).name

    def read(self, utterance_id: int) -> StoredUtterance:
        """Read an utterance as it is stored; see `read_utterance`."""
        return read_utterance(self._index, utterance_id, self._storage)

    def load(self, utterance_id: int, key: tuple[int, ...] = (), is_packed: bool = False) -> LoadedUtterance:
        """Read an utterance; decode, check and augment its audio.

        Args:
            utterance_id: its number in the index.
            key: (seed, epoch), which together with the utterance seeds the augmentation.
            is_packed: whether it shares its window with others, so that augmentation must not lengthen it.

        Raises:
            UtteranceError: the utterance is unusable; its reason says why.
            ReadError: its shard cannot be read at all, or the storage fails.
        """
        stored = self.read(utterance_id)
        try:
            pcm = self._pcm(utterance_id, stored, key, is_packed)
            # An instruction may ask for case and punctuation: its answer keeps them.
            steps = self._prompting.target_text if stored.instruction is None else ()
            target = apply_steps(steps, stored.text)
            if not target and not self._takes_all:
                raise ValueError("has no text after the steps of `target_text`")
        except OwnFunctionError as error:
            raise self._unusable(utterance_id, stored.key, ValueError(f"has a text that fails: {error}")) from error
        except UserError:
            raise
        except Exception as error:
            # Decoders and transforms raise errors of any type.
            raise self._unusable(utterance_id, stored.key, error) from error
        return LoadedUtterance(
            utterance_id, stored.key, pcm, stored.text, target, stored.language, stored.instruction, stored.fields
        )

    def example(self, utterance_id: int) -> Example:
        """Load an utterance as an example of its own.

        Raises:
            UtteranceError: the utterance is unusable; its reason says why.
        """
        return self.join([self.load(utterance_id)])

    def join(self, utterances: Sequence[LoadedUtterance], key: tuple[int, ...] = ()) -> Example:
        """Join utterances of one language into one example: their audio and their texts, one after the other.

        Args:
            utterances: one or more; an utterance with an instruction must be alone.
            key: (seed, epoch), which together with the first utterance seeds the draws of the prompt.

        Raises:
            UtteranceError: the text or the whole example is too long, or mistral-common does not know the language.
        """
        first = utterances[0]
        text, target = _joined([one.text for one in utterances]), _joined([one.target for one in utterances])
        pcm = np.concatenate([one.pcm for one in utterances]) if len(utterances) > 1 else first.pcm
        example = Example(
            utterance_id=first.utterance_id,
            key=first.key,
            pcm=pcm,
            num_windows=self._prompts.num_windows(len(pcm)),
            prompt=(),
            completion=tuple(self._prompts.completion(target)),
            reference=text,
            duration_seconds=len(pcm) / self._prompts.sampling_rate,
            num_utterances=len(utterances),
            is_transcription=first.instruction is None,
            fields={name: first.fields[name] for name in self._kept_fields if name in first.fields},
        )
        try:
            self._check_targets(example)
            example = self._with_prompt(example, utterances, target, (*key, first.utterance_id))
            self._check_positions(example)
        except UserError:
            raise
        except Exception as error:
            raise self._unusable(first.utterance_id, first.key, error) from error
        return example

    def _with_prompt(
        self, example: Example, utterances: Sequence[LoadedUtterance], target: str, key: tuple[int, ...]
    ) -> Example:
        """The example with its prompt, and with the language tag in its completion if the prompt omits the language."""
        first = utterances[0]
        if first.instruction is not None:
            return replace(example, prompt=self._prompts.instruction(first.instruction, example.num_windows))
        context = self._prompting.context(target, [one.fields for one in utterances], key)
        is_untagged = first.language is None or self._prompting.is_untagged(key)
        prompt = self._prompts.transcription(None if is_untagged else first.language, example.num_windows, context)
        tag = self._prompts.tag(first.language) if is_untagged and first.language is not None else ()
        completion = (*tag, *example.completion)
        return replace(example, prompt=prompt, completion=completion, is_untagged=is_untagged, context=context)

    def _check_targets(self, example: Example) -> None:
        if self._max_target_tokens is not None and len(example.completion) > self._max_target_tokens:
            raise _TooLongError(
                f"has {counted(len(example.completion), 'target token')}, more than the limit of "
                f"{self._max_target_tokens}"
            )

    def _check_positions(self, example: Example) -> None:
        # The last token is predicted, and never an input.
        num_positions = len(example.prompt) + len(example.completion) - 1
        if num_positions > self._prompts.max_positions:
            raise _TooLongError(
                f"takes {counted(num_positions, 'position')} of the language model, which has "
                f"{self._prompts.max_positions}"
            )

    def _pcm(self, utterance_id: int, stored: StoredUtterance, key: tuple[int, ...], is_packed: bool) -> Pcm:
        rate = self._prompts.sampling_rate
        if self._augmentation is None:
            pcm = decode_pcm(stored.audio, rate)
            self._check(utterance_id, pcm, stored)
            return pcm
        waveform = decode_audio(stored.audio, rate)
        self._check(utterance_id, waveform, stored)
        windows = self._prompts.num_windows(len(waveform)) * self._prompts.window_samples
        max_samples = len(waveform) if is_packed else windows
        return to_pcm(self._augmentation(waveform, rate, (*key, utterance_id), max_samples))

    def _check(self, utterance_id: int, audio: Waveform | Pcm, stored: StoredUtterance) -> None:
        # Truncated mp3 and wav files decode to less audio without an error.
        seconds = len(audio) / self._prompts.sampling_rate
        expected = float(self._index.record(utterance_id)["duration_ms"]) / 1000.0
        if not is_same_duration(seconds, expected):
            raise AudioError(f"decodes to {seconds:.2f} s of audio, but its index says {expected:.2f} s")
        if self._takes_all:
            return
        if is_silent(audio):
            raise AudioError("is silent: it never reaches -60 dB of full scale")
        if stored.instruction is None and is_too_much_text(len(stored.text), seconds, self._max_chars_per_second):
            raise AudioError(f"lasts {seconds:.2f} s, too short for a text of {counted(len(stored.text), 'character')}")

    def _unusable(self, utterance_id: int, key: str, error: Exception) -> UtteranceError:
        return UtteranceError(
            BadUtterance(self.shard_name(utterance_id), key, described(error), isinstance(error, _TooLongError))
        )


def _joined(texts: Sequence[str]) -> str:
    """Join stripped texts by spaces; a single text stays as it is."""
    return " ".join(text.strip() for text in texts) if len(texts) > 1 else texts[0]

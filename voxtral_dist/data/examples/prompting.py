"""What a prompt tells the model besides the audio: the language or not, and a context.

A context is text behind the audio in the user's turn (context biasing, docs/context.md):

    Previous text: ... and then we met Siobhan.
    Keywords: Siobhan, Xiaomi, ibuprofen

Its keywords are listed words, which are the entries of a word list. In training they are true words (listed words that
occur in the transcript) and distractors (listed words that do not), so that the model learns to write a listed word
where it hears it, and only there: "Lightweight Prompt Biasing for Contextualized End-to-End ASR Systems" (arXiv
2506.06252).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from voxtral_dist.config import ContextConfig, TextStep, TrainDataConfig
from voxtral_dist.data.plan.permutation import hash_values
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.text.steps import collapse_spaces
from voxtral_dist.text.word_list import WordList

# The last part of a draw's key, so that the draws of one utterance are independent.
_CONTEXT_DRAW = 1
_TAG_DRAW = 2


class Contexts(Protocol):
    """Makes contexts: `TrainingContexts` for training sets, `TestContexts` for test sets."""

    def __call__(self, text: str, fields: Sequence[Mapping[str, Any]], key: Sequence[int]) -> str:
        """The context of an utterance, or of several packed ones; empty for none.

        Args:
            text: the targets of all utterances.
            fields: the json of each utterance.
            key: integers that seed the draws.
        """


@dataclass(frozen=True)
class Prompting:
    """How the utterances of a training or test set are prompted, and how their texts become targets.

    untagged_fraction: fraction of utterances whose prompt omits the language.
    contexts: makes the contexts of prompts; None for none.
    target_text: steps that make the target of a stored text.
    """

    untagged_fraction: float = 0.0
    contexts: Contexts | None = None
    target_text: tuple[TextStep, ...] = ()

    @classmethod
    def of_training(cls, config: TrainDataConfig, prompts: VoxtralPrompts, word_list: WordList | None) -> Prompting:
        """The prompting of a training set; `word_list` is what `training_word_list` reads."""
        contexts = None if config.context is None else TrainingContexts(config.context, prompts, word_list)
        return cls(config.untagged_fraction, contexts, config.target_text)

    def is_untagged(self, key: Sequence[int]) -> bool:
        """Whether the prompt of an utterance omits the language; drawn by a key of integers."""
        drawn = int(hash_values(np.zeros(1, dtype=np.int64), (*key, _TAG_DRAW))[0])
        return drawn < self.untagged_fraction * 2**64

    def context(self, text: str, fields: Sequence[Mapping[str, Any]], key: Sequence[int]) -> str:
        """The context of an utterance, or of several packed ones; empty for none. See `Contexts`."""
        return "" if self.contexts is None else self.contexts(text, fields, key)


class TrainingContexts:
    """Contexts with drawn listed words, of at most `ContextConfig.max_tokens` tokens."""

    def __init__(self, config: ContextConfig, prompts: VoxtralPrompts, word_list: WordList | None) -> None:
        """Make contexts from a word list, as `training_word_list` reads it, and from the json of utterances."""
        self._config = config
        self._prompts = prompts
        self._num_tokens = lru_cache(maxsize=2**16)(self._count_tokens)
        self._word_list = word_list or WordList([])

    def __call__(self, text: str, fields: Sequence[Mapping[str, Any]], key: Sequence[int]) -> str:
        """See `Contexts`; the previous text is that of the first utterance."""
        config, generator = self._config, np.random.default_rng([*key, _CONTEXT_DRAW])
        if generator.random() >= config.fraction:
            return ""
        words = self._fitting(self._draw(text, fields, generator))
        generator.shuffle(words)
        said = fields[0].get(config.previous_text_field) if config.previous_text_field else None
        return context_text(words, self._end_of(said, words) if isinstance(said, str) else "")

    def _draw(self, text: str, fields: Sequence[Mapping[str, Any]], generator: np.random.Generator) -> list[str]:
        """True words, followed by distractors: what comes first has priority for the room."""
        shared, own = self._word_list, _own_words(fields, self._config.words_field)
        # A word in both lists is drawn once.
        true = WordList([words.entries[number] for words in (own, shared) for number in words.entries_in(text)]).entries
        shown = [word for word in true if generator.random() < self._config.true_word_fraction]
        own_held = own.all_entries_in(text)
        others = [word for number, word in enumerate(own.entries) if number not in own_held]
        count = int(generator.integers(0, self._config.max_distractors, endpoint=True))
        drawn = distractors(len(shared.entries), shared.all_entries_in(text), count, generator)
        return list(WordList([*shown, *others, *(shared.entries[number] for number in drawn)]).entries)

    def _fitting(self, words: Sequence[str]) -> list[str]:
        """The words that fit into `max_tokens`, by priority."""
        room = self._config.max_tokens - self._count_tokens("Keywords:")
        kept = []
        for word in words:
            if (cost := self._num_tokens(f", {word}")) <= room:
                kept.append(word)
                room -= cost
        # A joined text rarely has more tokens than its parts.
        while kept and self._count_tokens(context_text(kept)) > self._config.max_tokens:
            kept.pop()
        return kept

    def _end_of(self, text: str, words: Sequence[str]) -> str:
        """The end of a text that fits beside the words; it begins with a whole word if the text has spaces."""
        end = collapse_spaces(text)
        ids = self._prompts.encode(end)
        while end and (excess := self._count_tokens(context_text(words, end)) - self._config.max_tokens) > 0:
            ids = ids[excess:]
            # The first token may be the end of a character or of a word.
            rest = self._prompts.decode(ids).lstrip("\ufffd")
            begins_inside = not rest.startswith(" ") and " " in rest
            end = (rest.partition(" ")[2] if begins_inside else rest).strip()
        return end

    def _count_tokens(self, text: str) -> int:
        return len(self._prompts.encode(text))


class TestContexts:
    """Contexts with all true words and a number of distractors, of any length.

    The distractors of a smaller number are among those of a larger one, so that the numbers can be compared.
    """

    __test__ = False  # pytest takes it for a test

    def __init__(self, word_list: WordList, num_distractors: int, largest: int) -> None:
        """Make contexts with `num_distractors` distractors; `largest` is the largest number that is compared."""
        self._word_list = word_list
        self._num_distractors = num_distractors
        self._largest = largest

    def __call__(self, text: str, fields: Sequence[Mapping[str, Any]], key: Sequence[int]) -> str:
        """See `Contexts`."""
        generator = np.random.default_rng([*key, _CONTEXT_DRAW])
        entries, held = self._word_list.entries, self._word_list.all_entries_in(text)
        drawn = distractors(len(entries), held, self._largest, generator)
        shown = [*self._word_list.entries_in(text), *drawn[: self._num_distractors]]
        return context_text([entries[shown[place]] for place in generator.permutation(len(shown))])


def context_text(words: Sequence[str], previous_text: str = "") -> str:
    """Format a context as the model reads it; empty without words and previous text.

    Example:
        >>> from voxtral_dist import VoxtralPrompts, context_text
        >>> print(context_text(["Siobhan", "Xiaomi"], previous_text="... and then we met Siobhan."))
        Previous text: ... and then we met Siobhan.
        Keywords: Siobhan, Xiaomi
        >>> prompts = VoxtralPrompts.from_pretrained("models/tiny")
        >>> ids = prompts.transcription("en", num_windows=1, context=context_text(["Siobhan"]))
    """
    lines = []
    if previous_text.strip():
        lines.append(f"Previous text: {collapse_spaces(previous_text)}")
    if words:
        lines.append(f"Keywords: {', '.join(words)}")
    return "\n".join(lines)


def training_word_list(config: ContextConfig | None) -> WordList | None:
    """Read the word list of a training set; None if none is configured.

    Raises:
        UserError: the file cannot be read or holds no words.
    """
    if config is None or config.words is None:
        return None
    return WordList.read(config.words, "train_data.context.words")


def distractors(num_entries: int, held: set[int], count: int, generator: np.random.Generator) -> list[int]:
    """Draw the numbers of up to `count` entries that are not in `held`, in random order."""
    wanted = min(num_entries, count + len(held))
    drawn = generator.choice(num_entries, size=wanted, replace=False).tolist() if wanted else []
    return [number for number in drawn if number not in held][:count]


def _own_words(fields: Sequence[Mapping[str, Any]], name: str | None) -> WordList:
    """The listed words in the json of the utterances themselves."""
    return WordList([word for one in fields for word in _words_in(one, name)])


def _words_in(fields: Mapping[str, Any], name: str | None) -> list[str]:
    """The words in a field that holds a list, or a text with commas between words; none if the field is absent."""
    listed = fields.get(name) if name else None
    if isinstance(listed, str):
        return listed.split(",")
    return [word for word in listed if isinstance(word, str)] if isinstance(listed, list) else []

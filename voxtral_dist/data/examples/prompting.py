"""Context biasing: what a prompt tells the model about words that are likely, and about what was said before.

    Previous text: ... and then we met Siobhan.
    Keywords: Siobhan, Xiaomi, ibuprofen

stands behind the audio in the user's turn. In training, lists hold true words (those of the transcript) and distractors
(words that it does not hold), so that the model learns to use a word where it hears it, and no other: the idea of
prompt biasing, "Lightweight Prompt Biasing for Contextualized End-to-End ASR Systems" (arXiv 2506.06252).
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

# What draws are keyed by, besides the sample.
_CONTEXT_DRAW = 1
_TAG_DRAW = 2


@dataclass(frozen=True)
class Prompting:
    """How the samples of a set are asked about, and what becomes of their texts.

    untagged_fraction: of the samples whose prompts do not tell the language. contexts: None gives none. target_text:
    the steps that make the answer of the stored text.
    """

    untagged_fraction: float = 0.0
    contexts: Contexts | None = None
    target_text: tuple[TextStep, ...] = ()

    @classmethod
    def of_training(cls, config: TrainDataConfig, prompts: VoxtralPrompts, words: WordList | None) -> Prompting:
        """That of a run with these words of contexts."""
        contexts = None if config.context is None else TrainingContexts(config.context, prompts, words)
        return cls(config.untagged_fraction, contexts, config.target_text)

    def is_untagged(self, key: Sequence[int]) -> bool:
        """Whether a sample is asked about without its language; drawn by the whole numbers of a key."""
        drawn = int(hash_values(np.zeros(1, dtype=np.int64), (*key, _TAG_DRAW))[0])
        return drawn < self.untagged_fraction * 2**64

    def context(self, text: str, fields: Sequence[Mapping[str, Any]], key: Sequence[int]) -> str:
        """The context of clips, drawn by the same key; empty for none. See `Contexts`."""
        return "" if self.contexts is None else self.contexts(text, fields, key)


def context_text(words: Sequence[str], previous_text: str = "") -> str:
    """A context as the model reads it; empty without words and without previous text."""
    lines = []
    if previous_text.strip():
        lines.append(f"Previous text: {collapse_spaces(previous_text)}")
    if words:
        lines.append(f"Keywords: {', '.join(words)}")
    return "\n".join(lines)


class Contexts(Protocol):
    """Makes the contexts of clips."""

    def __call__(self, text: str, fields: Sequence[Mapping[str, Any]], key: Sequence[int]) -> str:
        """The context of a clip, or of several that are packed together; empty for none.

        Args:
            text: the targets of all of them.
            fields: the json of the sample of each.
            key: whole numbers that the draws depend on.
        """


class TrainingContexts:
    """Contexts with drawn words, of at most `max_tokens` tokens."""

    def __init__(self, config: ContextConfig, prompts: VoxtralPrompts, words: WordList | None) -> None:
        """Contexts of a run with these words, as `training_word_list` reads them."""
        self._config = config
        self._prompts = prompts
        self._num_tokens = lru_cache(maxsize=2**16)(self._count_tokens)
        self._words = words or WordList([])

    def __call__(self, text: str, fields: Sequence[Mapping[str, Any]], key: Sequence[int]) -> str:
        """See `Contexts`; previous text is that of the first clip."""
        config, generator = self._config, np.random.default_rng([*key, _CONTEXT_DRAW])
        if generator.random() >= config.fraction:
            return ""
        words = self._fitting(self._draw(text, fields, generator))
        generator.shuffle(words)
        said = fields[0].get(config.previous_text_field) if config.previous_text_field else None
        return context_text(words, self._end_of(said, words) if isinstance(said, str) else "")

    def _draw(self, text: str, fields: Sequence[Mapping[str, Any]], generator: np.random.Generator) -> list[str]:
        """True words, and then distractors: what comes first fits first."""
        pool, own = self._words, WordList([word for one in fields for word in _words_in(one, self._config.words_field)])
        # The samples' own lists and the file may both have a word, which is drawn once.
        true = WordList([words.entries[number] for words in (own, pool) for number in words.entries_in(text)]).entries
        told = [word for word in true if generator.random() < self._config.true_word_fraction]
        own_held = own.all_entries_in(text)
        others = [word for number, word in enumerate(own.entries) if number not in own_held]
        count = int(generator.integers(0, self._config.max_distractors, endpoint=True))
        drawn = distractors(len(pool.entries), pool.all_entries_in(text), count, generator)
        return list(WordList([*told, *others, *(pool.entries[number] for number in drawn)]).entries)

    def _fitting(self, words: Sequence[str]) -> list[str]:
        room = self._config.max_tokens - self._count_tokens("Keywords:")
        kept = []
        for word in words:
            if (cost := self._num_tokens(f", {word}")) <= room:
                kept.append(word)
                room -= cost
        # Tokens of a joined text are those of its parts for nearly all words.
        while kept and self._count_tokens(context_text(kept)) > self._config.max_tokens:
            kept.pop()
        return kept

    def _end_of(self, text: str, words: Sequence[str]) -> str:
        """The end of a text that fits beside the words, from the beginning of a word where there are spaces."""
        end = collapse_spaces(text)
        ids = self._prompts.encode(end)
        while end and (excess := self._count_tokens(context_text(words, end)) - self._config.max_tokens) > 0:
            ids = ids[excess:]
            # The first token may be the end of a character, and of a word.
            rest = self._prompts.decode(ids).lstrip("\ufffd")
            begins_inside = not rest.startswith(" ") and " " in rest
            end = (rest.partition(" ")[2] if begins_inside else rest).strip()
        return end

    def _count_tokens(self, text: str) -> int:
        return len(self._prompts.encode(text))


class TestContexts:
    """Contexts with all true words and a number of distractors, of any length.

    The distractors of a shorter list are among those of a longer one, so that sizes can be compared.
    """

    __test__ = False  # pytest takes it for a test

    def __init__(self, words: WordList, num_distractors: int, largest: int) -> None:
        """Contexts of one size; `largest` is the largest of all sizes that are compared."""
        self.words = words
        self._num_distractors = num_distractors
        self._largest = largest

    def __call__(self, text: str, fields: Sequence[Mapping[str, Any]], key: Sequence[int]) -> str:
        """See `Contexts`."""
        generator = np.random.default_rng([*key, _CONTEXT_DRAW])
        held = self.words.all_entries_in(text)
        drawn = distractors(len(self.words.entries), held, self._largest, generator)
        listed = [*self.words.entries_in(text), *drawn[: self._num_distractors]]
        return context_text([self.words.entries[listed[place]] for place in generator.permutation(len(listed))])


def training_word_list(config: ContextConfig | None) -> WordList | None:
    """The words of a run's contexts; None without a file of them.

    Raises:
        UserError: their file is missing or empty.
    """
    if config is None or config.words is None:
        return None
    return WordList.read(config.words, "train_data.context.words")


def distractors(num_entries: int, held: set[int], count: int, generator: np.random.Generator) -> list[int]:
    """Numbers of `count` entries that a text does not hold, or of all there are, in a random order."""
    wanted = min(num_entries, count + len(held))
    drawn = generator.choice(num_entries, size=wanted, replace=False).tolist() if wanted else []
    return [number for number in drawn if number not in held][:count]


def _words_in(fields: Mapping[str, Any], name: str | None) -> list[str]:
    """The words that a field lists, or has with commas between them; a field that is absent lists none."""
    listed = fields.get(name) if name else None
    if isinstance(listed, str):
        return listed.split(",")
    return [word for word in listed if isinstance(word, str)] if isinstance(listed, list) else []

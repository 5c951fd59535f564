"""Named, versioned text normalization: the same for reference and hypothesis, and named in every report."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Normalizer:
    """A function on text, and the name and version that reports give it."""

    name: str
    version: int
    apply: Callable[[str], str]

    @property
    def label(self) -> str:
        """Such as `basic-1`."""
        return f"{self.name}-{self.version}"


def normalizer(name: Literal["none", "basic"]) -> Normalizer:
    """The normalizer of a name.

    `none` only evens out white space. `basic` also applies Unicode NFKC, lower case, and turns every mark of
    punctuation and every symbol into a space, except an apostrophe inside a word. Format characters vanish.
    """
    match name:
        case "none":
            return Normalizer("none", 1, _even_spaces)
        case "basic":
            return Normalizer("basic", 1, _basic)


def _even_spaces(text: str) -> str:
    return " ".join(text.split())


def _basic(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    # Invisible format characters stand inside words of many scripts: they are no breaks.
    visible = "".join(character for character in folded if unicodedata.category(character) != "Cf")
    kept = (character if _belongs_to_word(visible, place) else " " for place, character in enumerate(visible))
    return _even_spaces("".join(kept))


def _belongs_to_word(text: str, place: int) -> bool:
    character = text[place]
    if character == "'":
        return 0 < place < len(text) - 1 and text[place - 1].isalnum() and text[place + 1].isalnum()
    # Letters, marks (vowel signs of many scripts) and numbers.
    return unicodedata.category(character)[0] in "LMN"

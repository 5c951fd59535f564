"""Text steps that turn transcripts into training targets, and the folding by which words are compared.

Scoring applies the steps of a run to references and hypotheses too, and reports name them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

from voxtral_dist.config import TextStep

# Punctuation in Unicode, but read aloud.
_SPOKEN_MARKS = "%‰&@#§"
_APOSTROPHES = "'\u2019"
_HYPHENS = "-\u2010\u2011"
_DECIMAL_MARKS = ".,"


def apply_steps(steps: Sequence[TextStep], text: str) -> str:
    """Apply steps to a text in their order; without steps it is returned unchanged."""
    for step in steps:
        text = _STEPS[step](text)
    return text


def collapse_spaces(text: str) -> str:
    """Replace each run of whitespace by one space, and strip the ends."""
    return " ".join(text.split())


def fold(text: str) -> str:
    """Normalize a text for the comparison of words: Unicode NFKC, lower case, no punctuation.

    Punctuation marks and symbols become spaces, except an apostrophe inside a word. Format characters are removed.
    """
    folded = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    # Words of many scripts contain invisible format characters, which do not separate words.
    visible = "".join(character for character in folded if unicodedata.category(character) != "Cf")
    kept = (character if _belongs_to_word(visible, position) else " " for position, character in enumerate(visible))
    return collapse_spaces("".join(kept))


def _belongs_to_word(text: str, position: int) -> bool:
    character = text[position]
    if character == "'":
        return _is_between(_is_letter_or_digit, text, position)
    return _is_letter_or_digit(character)


def _lower_case(text: str) -> str:
    return text.lower()


def _no_punctuation(text: str) -> str:
    """Remove punctuation, except apostrophes and hyphens inside words, and decimal marks inside numbers.

    Symbols of currencies, percent, degrees and the like are kept: they are read aloud.
    """
    kept = (" " if _is_punctuation(text, position) else character for position, character in enumerate(text))
    return collapse_spaces("".join(kept))


def _is_punctuation(text: str, position: int) -> bool:
    character = text[position]
    if character in _SPOKEN_MARKS or unicodedata.category(character)[0] != "P":
        return False
    if character in _APOSTROPHES + _HYPHENS:
        return not _is_between(_is_letter_or_digit, text, position)
    if character in _DECIMAL_MARKS:
        return not _is_between(str.isdigit, text, position)
    return True


def _is_letter_or_digit(character: str) -> bool:
    """Whether a character is a letter, a digit or a combining mark, such as the vowel signs of many scripts."""
    return unicodedata.category(character)[0] in "LMN"


def _is_between(kind: Callable[[str], bool], text: str, position: int) -> bool:
    """Whether both neighbours of a character are of this kind."""
    return 0 < position < len(text) - 1 and kind(text[position - 1]) and kind(text[position + 1])


_STEPS: dict[TextStep, Callable[[str], str]] = {"lower_case": _lower_case, "no_punctuation": _no_punctuation}

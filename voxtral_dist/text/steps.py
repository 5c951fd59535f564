"""Named steps on text: what makes targets of transcripts, and the folding by which words are compared.

The steps of a run's targets are applied to references and hypotheses too when it is scored, and reports name them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

from voxtral_dist.config import TextStep

# Punctuation by Unicode, but spoken or part of a word.
_SPOKEN_MARKS = "%‰&@#§"
_APOSTROPHES = "'\u2019"
_HYPHENS = "-\u2010\u2011"
_DECIMAL_MARKS = ".,"


def apply_steps(steps: Sequence[TextStep], text: str) -> str:
    """The text after all steps in their order; without steps it is the same, to the last space."""
    for step in steps:
        text = _STEPS[step](text)
    return text


def even_spaces(text: str) -> str:
    """The words with one space between them."""
    return " ".join(text.split())


def fold(text: str) -> str:
    """Words as they are compared whatever their case, marks and width: Unicode NFKC, lower case, no punctuation.

    Every mark of punctuation and every symbol becomes a space, except an apostrophe inside a word. Format characters
    vanish.
    """
    folded = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    # Invisible format characters stand inside words of many scripts: they are no breaks.
    visible = "".join(character for character in folded if unicodedata.category(character) != "Cf")
    kept = (character if _belongs_to_word(visible, place) else " " for place, character in enumerate(visible))
    return even_spaces("".join(kept))


def _belongs_to_word(text: str, place: int) -> bool:
    character = text[place]
    if character == "'":
        return _is_between(_is_letter_or_digit, text, place)
    return _is_letter_or_digit(character)


def _lower_case(text: str) -> str:
    return text.lower()


def _no_punctuation(text: str) -> str:
    """Without marks of punctuation, except apostrophes and hyphens inside words and marks inside numbers.

    Symbols stay, such as those of currencies, percent and degrees: they are spoken.
    """
    kept = (" " if _is_punctuation(text, place) else character for place, character in enumerate(text))
    return even_spaces("".join(kept))


def _is_punctuation(text: str, place: int) -> bool:
    character = text[place]
    if character in _SPOKEN_MARKS or unicodedata.category(character)[0] != "P":
        return False
    if character in _APOSTROPHES + _HYPHENS:
        return not _is_between(_is_letter_or_digit, text, place)
    if character in _DECIMAL_MARKS:
        return not _is_between(str.isdigit, text, place)
    return True


def _is_letter_or_digit(character: str) -> bool:
    """Also of marks, such as the vowel signs of many scripts."""
    return unicodedata.category(character)[0] in "LMN"


def _is_between(kind: Callable[[str], bool], text: str, place: int) -> bool:
    """Whether both neighbours of a character are of a kind."""
    return 0 < place < len(text) - 1 and kind(text[place - 1]) and kind(text[place + 1])


_STEPS: dict[TextStep, Callable[[str], str]] = {"lower_case": _lower_case, "no_punctuation": _no_punctuation}

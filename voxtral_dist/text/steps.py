"""Text steps that turn transcripts into training targets, and the folding by which words are compared.

Scoring applies the steps of a run to references and hypotheses too, and reports name them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

from voxtral_dist.config import TextStep, is_function_name
from voxtral_dist.text.own_functions import OwnFunction, own_function

# Punctuation in Unicode, but read aloud.
_SPOKEN_MARKS = "%‰&@#§"
_APOSTROPHES = "'\u2019"
# Letters, marks and accents that are written for an apostrophe. NFKC would split the accents from their words.
_WRITTEN_APOSTROPHES = "\u2018\u2019\u201b\u02bc\u02bb\u02bd\u02b9\u2032\ua78c\u00b4\u0060\u05f3\uff07"
# Hebrew abbreviations have two strokes before their last letter, which are often written as a quotation mark.
_ONE_WRITING = dict.fromkeys(map(ord, _WRITTEN_APOSTROPHES), "'") | {0x5F4: '"'}
_DOTTED_I_LANGUAGES = frozenset({"tr", "az"})
# Tatweel, Arabic vowel signs and marks of the Quran, Hebrew points and accents, and marks that only choose a glyph.
_OMITTED = frozenset(
    map(
        chr,
        (
            *(0x0640, 0x0670, 0x034F, *range(0x064B, 0x0653), *range(0x06D6, 0x06DD), *range(0x06DF, 0x06E5)),
            *(0x06E7, 0x06E8, *range(0x06EA, 0x06EE), *range(0x0591, 0x05BE), 0x05BF, 0x05C1, 0x05C2, 0x05C4, 0x05C5),
            *(0x05C7, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)),
        ),
    )
)
_HYPHENS = "-\u2010\u2011"
_DECIMAL_MARKS = ".,"


def apply_steps(steps: Sequence[TextStep], text: str) -> str:
    """Apply steps to a text in their order; without steps it is returned unchanged.

    Raises:
        UserError: a function of the user cannot be used.
        OwnFunctionError: it fails on this text.
    """
    for step in steps:
        text = _own_step(step).apply(text) if is_function_name(step) else _STEPS[step](text)
    return text


def step_labels(steps: Sequence[TextStep]) -> list[str]:
    """The names of steps, those of the user's functions with their versions. Equal labels give equal texts.

    Raises:
        UserError: a function of the user cannot be used.
    """
    return [_own_step(step).label if is_function_name(step) else step for step in steps]


@cache
def _own_step(place: str) -> OwnFunction:
    return own_function(place, "text step")


def collapse_spaces(text: str) -> str:
    """Replace each run of whitespace by one space, and strip the ends."""
    return " ".join(text.split())


def fold(text: str, language: str | None = None) -> str:
    """Normalize a text for the comparison of words: what is heard alike and differs only in writing becomes equal.

    Unicode NFKC and lower case; punctuation marks and symbols become spaces, except an apostrophe inside a word, which
    is written in one way. Left out are format characters, Arabic tatweel, and the vowel signs that Arabic and Hebrew
    may omit. Decimal digits of all scripts become ASCII's. Combining marks of other scripts stay, such as the vowel
    signs of Indic ones.

    Args:
        text: of any language.
        language: ISO 639-1 code; Turkish and Azerbaijani have other lower cases of I.
    """
    folded = unicodedata.normalize("NFKC", text.translate(_ONE_WRITING))
    if language in _DOTTED_I_LANGUAGES:
        folded = folded.replace("I", "\u0131")
    # Python's lower case of a capital I with a dot is an i with a combining dot.
    folded = folded.replace("\u0130", "i").lower().replace("i\u0307", "i")
    visible = "".join(map(_unmarked, folded))
    kept = (character if _belongs_to_word(visible, position) else " " for position, character in enumerate(visible))
    return collapse_spaces("".join(kept).replace('"', ""))


def _unmarked(character: str) -> str:
    """A character without what writers may omit; a decimal digit in ASCII."""
    category = unicodedata.category(character)
    if category == "Cf" or character in _OMITTED:
        # Words of many scripts contain invisible format characters, which do not separate words.
        return ""
    return str(unicodedata.decimal(character)) if category == "Nd" else character


def _belongs_to_word(text: str, position: int) -> bool:
    character = text[position]
    if character == "'":
        return _is_between(_is_letter_or_digit, text, position)
    if character == '"':
        return _is_between(_is_hebrew, text, position)
    return _is_letter_or_digit(character)


def _is_hebrew(character: str) -> bool:
    return "\u05d0" <= character <= "\u05ea"


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

"""Languages and scripts without spaces between words."""

from __future__ import annotations

from bisect import bisect_right

# Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan, Dzongkha, Sichuan Yi.
_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "km", "my", "bo", "dz", "ii"})
# First and last characters: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han, Yi, more Burmese, Han (compatible and rare).
_RANGES = (
    *((0x0E01, 0x0E5B), (0x0E81, 0x0EDF), (0x0F00, 0x0FDA), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007)),
    *((0x3041, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x9FFF), (0xA000, 0xA4C6), (0xA9E0, 0xA9FE), (0xAA60, 0xAA7F)),
    *((0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1B000, 0x1B16F), (0x20000, 0x3FFFF)),
)
_STARTS = tuple(first for first, _ in _RANGES)


def has_spaces_between_words(text: str, language: str | None = None) -> bool:
    """Whether words of a text are written apart.

    Its language tells, where it is known; else whether most of its letters are of scripts without spaces.
    """
    if language is not None:
        return language not in _LANGUAGES
    num_letters = num_unspaced = 0
    for character in text:
        if character.isalnum():
            num_letters += 1
            num_unspaced += _is_unspaced(ord(character))
    return 2 * num_unspaced <= num_letters


def _is_unspaced(code_point: int) -> bool:
    place = bisect_right(_STARTS, code_point) - 1
    return place >= 0 and code_point <= _RANGES[place][1]

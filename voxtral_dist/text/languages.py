"""ISO 639-1 language codes, also from the locales and names that corpora use."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import pycountry
from pydantic import TypeAdapter, ValidationError
from pydantic_extra_types.language_code import LanguageAlpha2

_WRITTEN_TAG = re.compile(r"^\s*lang:([a-z]{2})")
_LANGUAGE_CODE: TypeAdapter[str] = TypeAdapter(LanguageAlpha2)

# Every ISO 639-1 code, sorted: what mistral-common accepts as the language of a transcription.
LANGUAGE_CODES: tuple[str, ...] = tuple(
    sorted(language.alpha_2 for language in pycountry.languages if hasattr(language, "alpha_2"))
)


def is_language_code(text: str) -> bool:
    """Whether mistral-common accepts the text as a language: an ISO 639-1 code in lower case."""
    try:
        _LANGUAGE_CODE.validate_python(text)
    except ValidationError:
        return False
    return True


def split_language_tag(text: str) -> tuple[str | None, str]:
    """The language that a decoded transcript begins with, as in `lang:enHello.`, and the stripped rest.

    Models write it where the prompt has no language. None where there is none.
    """
    written = _WRITTEN_TAG.match(text)
    if written is None or written[1] not in LANGUAGE_CODES:
        return None, text.strip()
    return written[1], text[written.end() :].strip()


def language_code(value: Any) -> str | None:
    """The ISO 639-1 code of a code, a locale or an English name: `pt` for `pt-BR`, `por` or `Portuguese`.

    None and blank text give None.

    Raises:
        ValueError: it is none of these. The message is a predicate: callers put the utterance's name before it.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    code = _find_code(value) if isinstance(value, str) else None
    if code is None:
        raise ValueError(f"has the language {value!r}, which is not an ISO 639-1 code such as 'en'")
    return code


@lru_cache(maxsize=4096)
def _find_code(text: str) -> str | None:
    code = text.strip().replace("_", "-").partition("-")[0].lower()
    if is_language_code(code):
        return code
    try:
        found = pycountry.languages.lookup(code if len(code) == 3 else text.strip())
    except LookupError:
        return None
    return getattr(found, "alpha_2", None)

"""ISO 639-1 language codes, also from the locales and names that corpora use."""

from __future__ import annotations

import difflib
import logging
import re
import unicodedata
from functools import cache, lru_cache
from typing import Any

import pycountry
from pydantic import TypeAdapter, ValidationError
from pydantic_extra_types.language_code import LanguageAlpha2

log = logging.getLogger(__name__)

_LOCALE = re.compile(r"([A-Za-z]{2,3})(?:[-_.@][A-Za-z0-9].*)?$")
_PARENTHESES = re.compile(r"\s*\([^)]*\)\s*")
_WRITTEN_TAG = re.compile(r"^\s*lang:([a-z]{2})")
_LANGUAGE_CODE: TypeAdapter[str] = TypeAdapter(LanguageAlpha2)

# Every ISO 639-1 code, sorted: what mistral-common accepts as the language of a transcription.
LANGUAGE_CODES: tuple[str, ...] = tuple(
    sorted(language.alpha_2 for language in pycountry.languages if hasattr(language, "alpha_2"))
)

# Names that ISO 639 does not have, codes that it no longer has, and languages whose macrolanguage has a code.
_OTHER_NAMES = {
    "ar": "arb, arz, ary, apc, ajp, acm, afb, ars",
    "ay": "ayr",
    "az": "azj, azb",
    "ca": "valencian",
    "el": "greek",
    "es": "castilian",
    "et": "ekk",
    "fa": "persian, farsi, dari, pes, prs",
    "ff": "fula, fulani",
    "gd": "gaelic",
    "gn": "gug",
    "he": "iw",
    "ht": "haitian creole",
    "id": "in",
    "ja": "jp",
    "jv": "jw",
    "km": "khmer",
    "ku": "sorani, sorani kurdish, ckb, kurmanji, kurmanji kurdish, kmr",
    "ky": "kyrgyz",
    "lb": "letzeburgesch",
    "lg": "ganda, luganda",
    "lv": "lvs",
    "mg": "plt",
    "mn": "khk",
    "ms": "zsm",
    "my": "burmese, myanmar",
    "nb": "bokmal",
    "ne": "npi",
    "nl": "flemish",
    "nn": "nynorsk",
    "ny": "nyanja",
    "om": "gaz",
    "or": "odia, ory",
    "pa": "punjabi",
    "ps": "pushto, pashto, pbt, pbu, pst",
    "qu": "quy, quz",
    "ro": "moldavian, moldovan, mo",
    "si": "sinhalese",
    "sl": "slovene",
    "sq": "als",
    "st": "sotho",
    "sw": "swh, swc",
    "tl": "filipino, fil",
    "ug": "uyghur",
    "uk": "ua",
    "uz": "uzn",
    "yi": "ji, ydd",
    "zh": "mandarin, mandarin chinese, cantonese, cantonese chinese, cmn, yue, wuu, nan, hak, cn",
}
# Languages that are not understood by speakers of the one whose code they get, by codes of three letters and names.
_OTHER_LANGUAGES = {
    **dict.fromkeys(("yue", "cantonese", "cantonese chinese"), "Cantonese"),
    "wuu": "Wu Chinese",
    "nan": "Min Nan Chinese",
    "hak": "Hakka Chinese",
}
# Words before the name of a language that say where or how it is spoken or written.
_QUALIFIERS = frozenset(
    {
        *("american", "argentine", "argentinian", "australian", "austrian", "brazilian", "british", "canadian"),
        *("chilean", "colombian", "egyptian", "european", "gulf", "indian", "iranian", "irish", "latin", "levantine"),
        *("mexican", "modern", "new", "zealand", "nigerian", "scottish", "simplified", "south", "african", "standard"),
        *("taiwanese", "traditional", "us", "uk", "western", "eastern", "mandarin"),
    }
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
    """The ISO 639-1 code of a code, a locale or an English name: `pt` for `pt-BR`, `pt_BR.UTF-8`, `por`, `Portuguese`.

    Names are those of ISO 639 and those that Whisper, FLEURS and Common Voice use. A language without a code of its own
    gets that of its macrolanguage: `zh` for `cmn` and `Mandarin Chinese`. None and blank text give None.

    Raises:
        ValueError: it is none of these. The message is a predicate: callers put the utterance's name before it.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    code = _find_code(value) if isinstance(value, str) else None
    if code is None:
        raise ValueError(f"has the language {value!r}, which is not an ISO 639-1 code such as 'en'{_suggestion(value)}")
    return code


def warn_of_shared_code(value: Any) -> None:
    """Warn, once, of a language that gets the code of another one, which its speakers do not understand."""
    if isinstance(value, str) and (name := _language_without_code(value)) is not None:
        _warn_once(name, language_code(value) or "")


@lru_cache(maxsize=4096)
def _language_without_code(text: str) -> str | None:
    first = _LOCALE.match(text.strip())
    return _OTHER_LANGUAGES.get(_plain(text)) or (_OTHER_LANGUAGES.get(first[1].lower()) if first else None)


@cache
def _warn_once(name: str, code: str) -> None:
    log.warning(
        "%s is labelled `%s`: prompts name a language by two letters, and %s has none of its own, so the model is told "
        "the same as for other languages of this code. If both are in the data, keep them in sets of their own: each "
        "then has results of its own.",
        name,
        code,
        name,
    )


@lru_cache(maxsize=4096)
def _find_code(text: str) -> str | None:
    names, plain = _codes_by_name(), _plain(text)
    if plain in names:
        return names[plain]
    first = _LOCALE.match(text.strip())
    if first is not None:
        code = first[1].lower()
        return code if is_language_code(code) else names.get(code)
    # "Portuguese (Brazil)" and "Brazilian Portuguese".
    without_region = _plain(_PARENTHESES.sub(" ", text).partition(",")[0])
    *qualifiers, last = without_region.split() or [""]
    return names.get(without_region) or (names.get(last) if _QUALIFIERS.issuperset(qualifiers) else None)


@cache
def _codes_by_name() -> dict[str, str]:
    """ISO 639-1 codes by names and codes of three letters, as `_plain` writes them."""
    codes = {code: code for code in LANGUAGE_CODES}
    for code, names in _OTHER_NAMES.items():
        codes |= dict.fromkeys(names.split(", "), code)
    for language in pycountry.languages:
        if not hasattr(language, "alpha_2"):
            continue
        spellings = [language.alpha_3, *language.name.split(";")]
        spellings += [getattr(language, name, "") for name in ("bibliographic", "common_name", "inverted_name")]
        for spelling in spellings:
            for name in (spelling, _PARENTHESES.sub(" ", spelling), spelling.partition(",")[0]):
                codes.setdefault(_plain(name), language.alpha_2)
    codes.pop("", None)
    return codes


def _plain(name: str) -> str:
    """A name in lower case, without accents, and with spaces in place of hyphens and underscores."""
    letters = (one for one in unicodedata.normalize("NFKD", name) if not unicodedata.combining(one))
    return " ".join("".join(letters).lower().replace("-", " ").replace("_", " ").split())


def _suggestion(value: Any) -> str:
    near = difflib.get_close_matches(_plain(str(value)[:100]), _codes_by_name(), n=1, cutoff=0.8)
    return f" (perhaps {_codes_by_name()[near[0]]!r}, {near[0]})" if near and len(near[0]) > 3 else ""

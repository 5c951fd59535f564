"""Languages by code, locale and name, as corpora and users write them."""

import pytest

from voxtral_dist import Question, UserError
from voxtral_dist.shards.corpus.fields import checked_language
from voxtral_dist.text.languages import LANGUAGE_CODES, _warn_once, language_code

# The names of FLEURS and of Whisper's tokenizer for languages that have a code of two letters.
NAMES = {
    "Greek": "el", "Swahili": "sw", "Malay": "ms", "Nepali": "ne", "Punjabi": "pa", "Mandarin Chinese": "zh",
    "Pashto": "ps", "Cantonese Chinese": "zh", "Khmer": "km", "Kyrgyz": "ky", "Fula": "ff", "Ganda": "lg",
    "Oriya": "or",
    "Nyanja": "ny", "Occitan": "oc", "Persian": "fa", "Filipino": "tl", "Sorani-Kurdish": "ku", "Burmese": "my",
    "Myanmar": "my", "Valencian": "ca", "Flemish": "nl", "Haitian Creole": "ht", "Sinhala": "si", "Sinhalese": "si",
    "Castilian": "es", "Moldovan": "ro", "Letzeburgesch": "lb", "Panjabi": "pa", "Bengali": "bn", "Bangla": "bn",
    "Norwegian": "no", "Norwegian Bokmål": "nb", "Nynorsk": "nn", "Frisian": "fy", "Slovene": "sl",
}  # fmt: skip
LOCALES = {
    "de-DE": "de", "de_DE.UTF-8": "de", "pt-BR": "pt", "zh-Hans-CN": "zh", "cmn_hans_cn": "zh", "yue-HK": "zh",
    "fil_ph": "tl", "ckb_iq": "ku", "sr-Latn": "sr", "nb-NO": "nb", "ga-IE": "ga", "rm-sursilv": "rm", "EN": "en",
    "por": "pt", "ger": "de", "deu": "de", "iw": "he", "arb": "ar", "swh": "sw", " fr ": "fr",
    "Chinese (Simplified)": "zh", "Portuguese (Brazil)": "pt", "Brazilian Portuguese": "pt", "Chinese, Mandarin": "zh",
    "Modern Standard Arabic": "ar", "GERMAN": "de",
}  # fmt: skip


@pytest.mark.parametrize(("written", "code"), (NAMES | LOCALES).items())
def test_a_language_is_known_by_name_and_locale(written, code):
    assert language_code(written) == code
    assert Question(written).language == code


def test_a_language_that_shares_a_code_is_said_once(caplog):
    _warn_once.cache_clear()
    for written in ("yue", "Cantonese", "yue_hant_hk", "zh", "cmn", "Mandarin Chinese", None):
        assert checked_language(written) == (written and "zh")
    assert Question("Cantonese").language == "zh"
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("Cantonese is labelled `zh`: prompts name a language by two letters")
    assert checked_language("wuu") == "zh"
    assert caplog.records[-1].getMessage().startswith("Wu Chinese is labelled `zh`")


def test_every_code_is_its_own():
    assert [language_code(code) for code in LANGUAGE_CODES] == list(LANGUAGE_CODES)


@pytest.mark.parametrize("written", [None, "", "  "])
def test_an_unknown_language_is_none(written):
    assert language_code(written) is None


@pytest.mark.parametrize("written", ["Klingon", "Northern-Sotho", "Luo", "Asturian", "hsb", 7, "Swiss German", "und"])
def test_other_languages_are_refused_and_never_taken_for_their_relatives(written):
    with pytest.raises(ValueError, match="is not an ISO 639-1 code"):
        language_code(written)


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(UserError, match=r"\(perhaps 'pt', portuguese\)\. Without a language"):
        Question("Portugese")

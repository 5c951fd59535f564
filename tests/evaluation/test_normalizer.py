"""What the normalizers make equal, and what they leave different."""

import unicodedata

import pytest

from voxtral_dist.evaluation.normalizer import normalizer

BASIC = normalizer("basic").apply
NONE = normalizer("none").apply

EXAMPLES = {
    "case and punctuation": ("Hello, World! How are you?", "hello world how are you"),
    "white space": ("  a\t b\n\nc\u00a0d  ", "a b c d"),
    "umlauts": ("Ärger über Öl, STRASSE und Straße", "ärger über öl strasse und straße"),
    "Hindi vowel signs": ("यह हिन्दी है।", "यह हिन्दी है"),
    "Thai vowel signs": ("ที่นี่", "ที่นี่"),
    "apostrophe in a word": ("l'été, don't", "l'été don't"),
    "typographic apostrophe": ("don’t", "don't"),
    "quotes": ("'quoted' “words” dogs' 'tis", "quoted words dogs tis"),
    "hyphen": ("well-known e—mail", "well known e mail"),
    "numbers": ("3.14 and 1,000", "3 14 and 1 000"),
    "symbols": ("5 € + 3 $ = 10 %", "5 3 10"),
    "compatibility forms": ("ﬁne ｗｉｄｅ ①", "fine wide 1"),
    "decomposed letters": ("cafe\u0301 U\u0308ber", "café über"),
    "dotted capital": ("İstanbul", "i\u0307stanbul"),
    "emoji": ("fine 👍 yes", "fine yes"),
    "nothing but punctuation": ("... ?!", ""),
    "nothing": ("", ""),
}


@pytest.mark.parametrize(("text", "expected"), EXAMPLES.values(), ids=EXAMPLES.keys())
def test_basic(text, expected):
    assert BASIC(text) == expected


@pytest.mark.parametrize(("text", "_"), EXAMPLES.values(), ids=EXAMPLES.keys())
def test_normalizing_twice_changes_nothing(text, _):
    assert BASIC(BASIC(text)) == BASIC(text)
    assert NONE(NONE(text)) == NONE(text)


@pytest.mark.parametrize("text", [text for text, _ in EXAMPLES.values()])
def test_composed_and_decomposed_text_are_equal(text):
    assert BASIC(unicodedata.normalize("NFC", text)) == BASIC(unicodedata.normalize("NFD", text))


@pytest.mark.parametrize(
    ("text", "num_words"),
    [
        # A joiner between consonants, a non-joiner in a Persian verb, and a soft hyphen: invisible, and inside a word.
        ("क्\u200dष", 1),
        ("می\u200cخواهم", 1),
        ("Donau\u00addampf\u00adschiff", 1),
        ("\ufeffone two\u200e", 2),
    ],
)
def test_invisible_format_characters_do_not_split_words(text, num_words):
    assert len(BASIC(text).split()) == num_words


def test_none_only_evens_out_white_space():
    assert NONE("  Hello,\t World!\n ’tis ﬁne ") == "Hello, World! ’tis ﬁne"


def test_a_label_names_the_normalizer_and_its_version():
    assert [normalizer(name).label for name in ("none", "basic")] == [
        f"none-{normalizer('none').version}",
        f"basic-{normalizer('basic').version}",
    ]

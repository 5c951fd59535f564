"""Which texts the normalizers make equal, and which they keep different."""

import hashlib
import json
import unicodedata
from pathlib import Path

import pytest
import transformers

from voxtral_dist.errors import RankError, UserError
from voxtral_dist.scoring import normalizer as normalizer_module
from voxtral_dist.scoring.normalizer import normalizer, normalizer_of_label

BASIC = normalizer("basic").apply
NONE = normalizer("none").apply

EXAMPLES = {
    "case and punctuation": ("Hello, World! How are you?", "hello world how are you"),
    "white space": ("  a\t b\n\nc\u00a0d  ", "a b c d"),
    "umlauts": ("Ärger über Öl, STRASSE und Straße", "ärger über öl strasse und straße"),
    "Hindi vowel signs": ("यह हिन्दी है।", "यह हिन्दी है"),
    "Thai vowel signs": ("ที่นี่", "ที่นี่"),
    "apostrophe in a word": ("l'été, don't", "l'été don't"),
    "apostrophe between marks": ("का'ख े' 'ि", "का'ख े ि"),
    "typographic apostrophe": ("don’t", "don't"),
    "quotes": ("'quoted' “words” dogs' 'tis", "quoted words dogs tis"),
    "hyphen": ("well-known e—mail", "well known e mail"),
    "numbers": ("3.14 and 1,000", "3 14 and 1 000"),
    "symbols": ("5 € + 3 $ = 10 %", "5 3 10"),
    "compatibility forms": ("ﬁne ｗｉｄｅ ①", "fine wide 1"),
    "decomposed letters": ("cafe\u0301 U\u0308ber", "café über"),
    "dotted capital": ("İstanbul", "istanbul"),
    "apostrophes of all kinds": ("п'ять пʼять п’ять п‘ять п´ять п`ять", " ".join(["п'ять"] * 6)),
    "okina": ("Hawaiʻi Hawai'i", "hawai'i hawai'i"),
    "tatweel": ("كتـــاب", "كتاب"),
    "Arabic vowel signs": ("هٰذَا كِتَابٌ جَدِيدٌ", "هذا كتاب جديد"),
    "Arabic hamza stays": ("أكل إلى آخر", "أكل إلى آخر"),
    "Hebrew points": ("שָׁלוֹם", "שלום"),
    "gershayim": ('צה״ל צה"ל "צהל"', "צהל צהל צהל"),
    "digits of all scripts": ("१२ ٣٤ ๕", "12 34 5"),
    "Indic marks": ("क्षत्रिय தமிழ் తెలుగు বাংলা ਪੰਜਾਬੀ", "क्षत्रिय தமிழ் తెలుగు বাংলা ਪੰਜਾਬੀ"),
    "variation selector": ("fine ❤\ufe0f yes", "fine yes"),
    "emoji": ("fine 👍 yes", "fine yes"),
    "nothing but punctuation": ("... ?!", ""),
    "nothing": ("", ""),
}


@pytest.mark.parametrize(("text", "expected"), EXAMPLES.values(), ids=EXAMPLES.keys())
def test_basic(text, expected):
    assert BASIC(text) == expected


@pytest.mark.parametrize("language", ["tr", "az"])
def test_basic_knows_the_dotless_i_of_turkish(language):
    assert (
        BASIC("İSTANBUL ISPARTA Iğdır", language)
        == "istanbul ısparta ığdır"
        == BASIC("istanbul ısparta ığdır", language)
    )
    assert BASIC("IT IS", "en") == BASIC("IT IS") == "it is"
    assert normalizer("none").apply("IT", language) == "IT"


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


# Whisper's normalizers, on the examples of openai/whisper's tests (tests/test_normalizer.py of version 20250625).

ENGLISH = normalizer("whisper_english").apply
WHISPER_BASIC = normalizer("whisper_basic").apply

PUBLISHED = {
    "two": "2",
    "thirty one": "31",
    "five twenty four": "524",
    "nineteen ninety nine": "1999",
    "twenty nineteen": "2019",
    "two point five million": "2500000",
    "four point two billions": "4200000000s",
    "200 thousand dollars": "$200000",
    "$20 million": "$20000000",
    "€52.4 million": "€52400000",
    "£77 thousands": "£77000s",
    "two double o eight": "2008",
    "forty three thousand two hundred and sixty": "43260",
    "nineteen fifties": "1950s",
    "thirty three thousand and three hundred and thirty third": "33333rd",
    "august twenty sixth twenty twenty one": "august 26th 2021",
    "3 14": "3 14",
    "3 point 14": "3.14",
    "two point two five dollars": "$2.25",
    "ninety percent": "90%",
    "seventy six per cent": "76%",
    "double oh seven": "007",
    "one triple oh one": "10001",
    "thirty two thousandth": "32000th",
    "minus 500": "-500",
    "positive twenty thousand": "+20000",
    "two dollars and seventy cents": "$2.70",
    "$0.36": "¢36",
    "three euros and sixty five cents": "€3.65",
    "three and a half million": "3500000",
    "b747": "b 747",
    "10 th": "10th",
    "mobilisation": "mobilization",
    "cancelation": "cancellation",
    "Let's": "let us",
    "he's like": "he is like",
    "she's been like": "she has been like",
    "10km": "10 km",
    "RC232": "rc 232",
    "Mr. Park visited Assoc. Prof. Kim Jr.": "mister park visited associate professor kim junior",
}


@pytest.mark.parametrize(("text", "expected"), PUBLISHED.items(), ids=PUBLISHED.keys())
def test_whisper_english_is_the_published_one(text, expected):
    assert ENGLISH(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Äh, [Lachen] straße (leise) geht's?", "äh straße geht s"),
        ("  ¿Qué <unk> tal?  ", "qué tal"),
        ("twenty one", "twenty one"),
    ],
)
def test_whisper_basic_drops_brackets_and_punctuation_and_keeps_letters(text, expected):
    assert WHISPER_BASIC(text) == expected


def test_whisper_basic_cuts_words_at_vowel_signs_and_basic_does_not():
    """docs/evaluation.md warns of it."""
    assert len(WHISPER_BASIC("हिन्दी").split()) > 1
    assert len(BASIC("हिन्दी").split()) == 1


def test_the_table_of_spellings_is_openais():
    """The checksum is that of whisper/normalizers/english.json in the source package openai-whisper 20250625."""
    contents = Path(normalizer_module.__file__).with_name("english_spelling.json").read_bytes()
    assert len(json.loads(contents)) == 1739
    assert hashlib.sha256(contents).hexdigest() == "6607f948be9824d2e1b2fa2223cd94c06c45afa4e05ea0e3d5e1f2bdffde2465"


@pytest.mark.parametrize("name", ["none", "basic", "whisper_english"])
def test_a_label_gives_its_normalizer_back(name):
    used = normalizer(name, ("lower_case", "no_punctuation"))
    found = normalizer_of_label(used.label)
    assert (found.name, found.version, found.target_text) == (used.name, used.version, used.target_text)
    assert found.apply("Hello, Colour ten!") == used.apply("Hello, Colour ten!")
    assert normalizer_of_label(f"{name}-of-old").label == normalizer(name).label


def test_whispers_labels_name_the_version_of_transformers():
    assert normalizer("whisper_english").label == f"whisper_english-transformers-{transformers.__version__}"
    assert normalizer("whisper_basic", ("lower_case",)).label.startswith("lower_case+whisper_basic-transformers-")


# Functions of the user.


def test_a_function_of_the_user_is_applied_and_its_label_tells_its_source(own):
    module = own("class Own:\n    @staticmethod\n    def shout(text):\n        return '  ' + text.upper()\n")
    shout = normalizer(f"{module}:Own.shout", ("no_punctuation",))
    assert shout.apply("so,  what") == "SO WHAT"
    assert shout.label.startswith(f"no_punctuation+{module}:Own.shout-")
    same, other = own("def f(text):\n    return text\n"), own("def f(text):\n    return text.lower()\n")
    versions = [normalizer(f"{name}:f").version for name in (same, other, same)]
    assert versions[0] == versions[2] != versions[1]


@pytest.mark.parametrize(
    ("source", "function", "sentence"),
    [
        ("def f(text): return text", "g", "has no attribute `g`"),
        ("f = 'lower'", "f", "must be a function, but is 'lower' instead"),
        ("def f(text): return None", "f", "must return a string, but returned None for"),
        ("def f(text): return text.split()", "f", "must return a string, but returned ["),
        (
            "def f(text, language): return text",
            "f",
            "failed on the text 'Hello, World: 1 2 3.': TypeError: f() missing",
        ),
        ("import nowhere", "f", "cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
        ("def f(", "f", "cannot be imported (SyntaxError: "),
        ("import sys\nsys.exit(0)", "f", "cannot be imported (SystemExit: 0)"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_sentence(own, source, function, sentence):
    with pytest.raises(UserError) as refused:
        normalizer(f"{own(source)}:{function}")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert type(refused.value) is UserError, "all ranks meet it"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere:f", "module nowhere cannot be imported"),
        ("builtins:ascii", "module builtins has no source file"),
        (
            "bsic",
            "must be none, basic, whisper_english, whisper_basic, open_asr_en, or a function as",
        ),
        ("a b:c", "or a function as `module:function`, but is 'a b:c' instead"),
    ],
)
def test_a_normalizer_that_is_not_there_is_one_sentence(name, sentence):
    with pytest.raises(UserError, match="The normalizer") as refused:
        normalizer(name)
    assert sentence in str(refused.value)


def test_a_function_that_a_file_names_runs_only_if_the_user_names_it_too(own):
    place = own("from pathlib import Path\nPath('ran').touch()\ndef f(text):\n    return text.upper()\n") + ":f"
    for trusted in (None, "basic", place.replace(":f", ":g")):
        with pytest.raises(UserError, match=f"add `--normalizer {place}` if you trust it"):
            normalizer_of_label(f"lower_case+{place}-123456789abc", trusted)
    assert not Path("ran").exists()
    assert normalizer_of_label(f"{place}-123456789abc", place).apply("so") == "SO"


def test_a_step_that_a_file_names_runs_only_if_the_user_names_it_too(own):
    place = own("from pathlib import Path\nPath('ran').touch()\ndef f(text):\n    return text.upper()\n") + ":f"
    label = f"{place}-123456789abc+basic-3"
    for trusted in ((None, ()), (place, ()), (None, (place.replace(":f", ":g"),))):
        with pytest.raises(UserError, match=f"add `--target-text {place}` if you trust it"):
            normalizer_of_label(label, *trusted)
    assert not Path("ran").exists()
    found = normalizer_of_label(label, None, [place])
    assert found.label == normalizer("basic", [place]).label != label
    assert found.orthographic.apply("so") == "SO"


def test_a_step_that_cannot_be_used_is_refused_with_its_normalizer(own):
    with pytest.raises(UserError, match=r"^The text step `own_\w+:f` must return a string, but returned None for"):
        normalizer("basic", ["lower_case", own("def f(text): return None") + ":f"])


def test_a_function_that_fails_on_one_text_names_it(own):
    used = normalizer(own("def f(text): return text if 'odd' not in text else 1 / 0") + ":f")
    assert used.apply("even") == "even"
    with pytest.raises(RankError, match="failed on the text 'an odd one': ZeroDivisionError: division by zero"):
        used.apply("an odd one")

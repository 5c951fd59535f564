"""The named steps that make targets of transcripts."""

import hashlib
from pathlib import Path

import pytest

from voxtral_dist.text.own_functions import OwnFunctionError
from voxtral_dist.text.steps import apply_steps, fold, step_labels


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World! How are you?", "Hello World How are you"),
        ("l'été, don't, dogs' 'tis", "l'été don't dogs tis"),
        ("well-known – e—mail - so", "well-known e mail so"),
        ("3.14, 1,000. 5 % of 20 € & more", "3.14 1,000 5 % of 20 € & more"),
        ("«Ja», sagte er; „nein“…", "Ja sagte er nein"),
        ("यह हिन्दी है। मर्ज़ी-से", "यह हिन्दी है मर्ज़ी-से"),
        ("السلام، عليكم؟", "السلام عليكم"),
        ("... ?!", ""),
        ("a.b 1.a .5 5.", "a b 1 a 5 5"),
    ],
)
def test_no_punctuation(text, expected):
    assert apply_steps(["no_punctuation"], text) == expected


def test_lower_case():
    assert apply_steps(["lower_case"], "Über STRASSE, ÉTÉ") == "über strasse, été"


def test_steps_follow_each_other_and_no_step_changes_nothing():
    assert apply_steps(["lower_case", "no_punctuation"], "  Oh,  No! ") == "oh no"
    assert apply_steps([], "  Oh,  No! ") == "  Oh,  No! "


@pytest.mark.parametrize("text", ["Hello, World", "l'été 3.14", "well-known", "5 €"])
def test_words_that_are_compared_do_not_depend_on_the_steps(text):
    assert fold(apply_steps(["lower_case", "no_punctuation"], text)) == fold(text)


def test_a_function_of_the_user_is_a_step_among_others_and_has_the_version_of_its_source(own):
    source = "def spelled(text):\n    return text.replace('%', ' percent')\n"
    module = own(source)
    steps = ["no_punctuation", f"{module}:spelled", "lower_case"]
    assert apply_steps(steps, "Some 5%, I SAID.") == "some 5 percent i said"
    version = hashlib.sha256(source.encode()).hexdigest()[:12]
    assert step_labels(steps) == ["no_punctuation", f"{module}:spelled-{version}", "lower_case"]
    assert Path(f"{module}.py").read_text() == source


def test_a_step_that_fails_on_one_text_names_it(own):
    step = own("def f(text):\n    return text[: 1 // ('odd' not in text)]") + ":f"
    assert apply_steps([step], "even") == "e"
    with pytest.raises(OwnFunctionError, match=rf"The text step `{step}` failed on the text 'odd': ZeroDivisionError"):
        apply_steps([step], "odd")

"""Text normalizers, applied alike to references and hypotheses; results name them with their version."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from voxtral_dist.config import TextStep, check_normalizer, is_function_name
from voxtral_dist.errors import UserError
from voxtral_dist.scoring.open_asr import open_asr_english
from voxtral_dist.text.own_functions import own_function
from voxtral_dist.text.steps import apply_steps, collapse_spaces, fold, step_labels

_ENGLISH_SPELLING = Path(__file__).with_name("english_spelling.json")


@dataclass(frozen=True)
class Normalizer:
    """A function on text, with its name and version.

    target_text: the steps applied to the targets in training; they run before the function.
    takes_language: whether the function's second argument is the ISO 639-1 code of the language, None if unknown.

    Example:
        >>> from voxtral_dist import Normalizer
        >>> upper = Normalizer("upper", "1", str.upper)
        >>> upper.label, upper.apply("one  two")
        ('upper-1', 'ONE TWO')
    """

    name: str
    version: str
    function: Callable[..., str]
    target_text: tuple[TextStep, ...] = ()
    takes_language: bool = False

    @property
    def label(self) -> str:
        """Name and version such as `basic-3`, or `lower_case+basic-3` after a step of target text.

        Normalizers with equal labels give equal texts.
        """
        return "+".join([*step_labels(self.target_text), f"{self.name}-{self.version}"])

    @property
    def orthographic(self) -> Normalizer:
        """The normalizer for orthographic rates, where case and punctuation count; keeps the steps of target text."""
        return Normalizer("none", "1", str, self.target_text)

    def apply(self, text: str, language: str | None = None) -> str:
        """Normalize a text of a language; its words are separated by single spaces."""
        stepped = apply_steps(self.target_text, text)
        return collapse_spaces(self.function(stepped, language) if self.takes_language else self.function(stepped))


def normalizer(name: str, target_text: Sequence[TextStep] = ()) -> Normalizer:
    """Make a normalizer by name.

    `none` only evens out white space. `basic` also applies Unicode NFKC and the lower case of the language, replaces
    punctuation and symbols by spaces, except an apostrophe inside a word, and removes what writers of a script may
    omit (see `fold`). `whisper_english` and
    `whisper_basic` are Whisper's (Radford et al., arXiv 2212.04356, appendix C), as implemented in transformers.
    `open_asr_en` is that of the Open ASR Leaderboard, run from a clone of its repository, and `open_asr_en@COMMIT` that
    of one commit. `module:function` is your own function.

    Args:
        name: of the normalizer.
        target_text: steps applied to the targets in training, which run first.

    Raises:
        UserError: the name is unknown, or your function or your text step cannot be used.

    Example:
        >>> from voxtral_dist import normalizer
        >>> normalizer("basic").apply("It's 5 o'clock, Mr. Smith!")
        "it's 5 o'clock mr smith"
        >>> normalizer("whisper_english").apply("It's twenty-one, Mr. Smith!")
        'it is 21 mister smith'
    """
    version, function = _named(name)
    # Steps that cannot be used are refused here, not at the first text.
    step_labels(target_text)
    return Normalizer(name.partition("@")[0], version, function, tuple(target_text), takes_language=name == "basic")


def normalizer_of_label(label: str, trusted: str | None = None, trusted_steps: Collection[str] = ()) -> Normalizer:
    """Make the normalizer that a result names; its label differs if this machine has another version.

    Args:
        label: as stored in a result, which may be from an untrusted source.
        trusted: name of your own normalizer. A function that only a file names is never imported.
        trusted_steps: names of your own text steps.

    Raises:
        UserError: the name or a step is unknown, or the label names a function that is not trusted.
    """
    *steps, name = (part.partition("-")[0] for part in label.split("+"))
    try:
        known = TypeAdapter(list[TextStep]).validate_python(steps)
    except ValidationError as error:
        raise UserError(f"The normalizer {label!r} has an unknown step: score again.") from error
    for step in steps:
        _refuse_untrusted(step, trusted_steps, "--target-text")
    _refuse_untrusted(name, () if trusted is None else (trusted,), "--normalizer")
    return normalizer(name, known)


def _refuse_untrusted(name: str, trusted: Collection[str], option: str) -> None:
    if is_function_name(name) and name not in trusted:
        raise UserError(
            f"The results were normalized by the function {name!r}, which is not run unless you name it: add "
            f"`{option} {name}` if you trust it."
        )


def _named(name: str) -> tuple[str, Callable[..., str]]:
    """The version and function of a normalizer."""
    match name:
        case "none":
            return "1", str
        case "basic":
            return "3", fold
        case "whisper_english" | "whisper_basic":
            return _whisper(name)
        case _ if name.partition("@")[0] == "open_asr_en":
            return open_asr_english(check_normalizer(name))
        case _:
            return _own(name)


def _whisper(name: str) -> tuple[str, Callable[[str], str]]:
    # Importing transformers takes seconds, and the other normalizers do not need it.
    import transformers
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    version = f"transformers-{transformers.__version__}"
    if name == "whisper_basic":
        return version, BasicTextNormalizer()
    return version, EnglishTextNormalizer(json.loads(_ENGLISH_SPELLING.read_text(encoding="utf-8")))


def _own(place: str) -> tuple[str, Callable[[str], str]]:
    """The user's own function; its version is a hash of its module's source."""
    try:
        function = own_function(check_normalizer(place), "normalizer")
    except ValueError as error:
        raise UserError(f"The normalizer {error}.") from error
    return function.version, function.apply

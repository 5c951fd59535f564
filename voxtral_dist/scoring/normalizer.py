"""Named, versioned text normalization: the same for reference and hypothesis, and named in every report."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import ModuleType

from pydantic import TypeAdapter, ValidationError

from voxtral_dist.config import TextStep, check_normalizer
from voxtral_dist.errors import RankError, UserError, first_line
from voxtral_dist.text.steps import apply_steps, collapse_spaces, fold

_ENGLISH_SPELLING = Path(__file__).with_name("english_spelling.json")
_TRIAL_TEXT = "Hello, World: 1 2 3."


@dataclass(frozen=True)
class Normalizer:
    """A function on text, and the name and version that reports give it.

    target_text: the steps that were applied to the targets in training, which come before it.
    """

    name: str
    version: str
    function: Callable[[str], str]
    target_text: tuple[TextStep, ...] = ()

    @property
    def label(self) -> str:
        """Such as `basic-2`, or `lower_case+basic-2` after a step of target text; equal ones normalize alike."""
        return "+".join([*self.target_text, f"{self.name}-{self.version}"])

    @property
    def orthographic(self) -> Normalizer:
        """The one under which case and punctuation count, behind the same steps of target text."""
        return Normalizer("none", "1", str, self.target_text)

    def apply(self, text: str) -> str:
        """The text as it is compared, with one space between its words."""
        return collapse_spaces(self.function(apply_steps(self.target_text, text)))


def normalizer(name: str, target_text: Sequence[TextStep] = ()) -> Normalizer:
    """The normalizer of a name, for references and hypotheses alike, behind the steps that targets went through.

    `none` only evens out white space. `basic` also applies Unicode NFKC, lower case, and turns every mark of
    punctuation and every symbol into a space, except an apostrophe inside a word. Format characters vanish.
    `whisper_english` and `whisper_basic` are those of Whisper (Radford et al., arXiv 2212.04356, appendix C), as
    transformers has them. `module:function` is a function of the user.

    Raises:
        UserError: there is none of this name, or the user's function cannot be used.
    """
    version, function = _named(name)
    return Normalizer(name, version, function, tuple(target_text))


def normalizer_of_label(label: str, trusted: str | None = None) -> Normalizer:
    """What a report was normalized by, as it is on this machine: its own label differs where the version does.

    Args:
        label: of a file, which may come from anybody.
        trusted: the function that the user names; what a file alone names is never run.

    Raises:
        UserError: there is none of this name here, or it is a function that the user did not name.
    """
    *steps, named = label.split("+")
    try:
        known = TypeAdapter(list[TextStep]).validate_python(steps)
    except ValidationError as error:
        raise UserError(f"The normalizer {label!r} has a step that is not known here: score again.") from error
    name = named.partition("-")[0]
    if ":" in name and name != trusted:
        raise UserError(
            f"The results were normalized by the function {name!r}, which runs only if you name it: add `--normalizer "
            f"{name}` if you trust it."
        )
    return normalizer(name, known)


def _named(name: str) -> tuple[str, Callable[[str], str]]:
    """Version and function."""
    match name:
        case "none":
            return "1", str
        case "basic":
            return "2", fold
        case "whisper_english" | "whisper_basic":
            return _whisper(name)
        case _:
            return _own(name)


def _whisper(name: str) -> tuple[str, Callable[[str], str]]:
    # Importing transformers costs seconds, which the other normalizers do not need.
    import transformers
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    version = f"transformers-{transformers.__version__}"
    if name == "whisper_basic":
        return version, BasicTextNormalizer()
    return version, EnglishTextNormalizer(json.loads(_ENGLISH_SPELLING.read_text(encoding="utf-8")))


def _own(place: str) -> tuple[str, Callable[[str], str]]:
    """A function of the user; its version tells the source of its module."""
    try:
        module_name, _, path = check_normalizer(place).partition(":")
    except ValueError as error:
        raise UserError(f"The normalizer {error}.") from error
    module = _imported(module_name, place)
    try:
        function = reduce(getattr, path.split("."), module)
    except AttributeError as error:
        raise UserError(f"The normalizer `{place}`: the module {module_name} has no `{path}`.") from error
    if not callable(function):
        raise UserError(f"The normalizer `{place}` must be a function on text, but is {function!r} instead.")
    checked = _checked(function, place)
    try:
        checked(_TRIAL_TEXT)
    except RankError as error:
        # All ranks try the same text: it is nothing that one of them met alone.
        raise UserError(str(error)) from error
    return _fingerprint(module, place), checked


def _imported(name: str, place: str) -> ModuleType:
    # As with `python -m`, but last: a file of the user's must not stand in for a package.
    if os.getcwd() not in sys.path:  # noqa: PTH109
        sys.path.append(os.getcwd())  # noqa: PTH109
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"The normalizer `{place}`: the module {name} cannot be imported ({type(error).__name__}: "
            f"{first_line(error)}); it must lie in the working directory or be installed."
        ) from error


def _checked(function: Callable[[str], object], place: str) -> Callable[[str], str]:
    def applied(text: str) -> str:
        try:
            normalized = function(text)
        except Exception as error:
            raise RankError(
                f"The normalizer `{place}` failed on the text {text!r}: {type(error).__name__}: {first_line(error)}."
            ) from error
        if not isinstance(normalized, str):
            raise RankError(
                f"The normalizer `{place}` must return a text, but returned {normalized!r} of {text!r} instead."
            )
        return normalized

    return applied


def _fingerprint(module: ModuleType, place: str) -> str:
    """The beginning of the SHA-256 of the module's file."""
    if module.__spec__ is None or not module.__spec__.has_location or module.__file__ is None:
        raise UserError(
            f"The normalizer `{place}`: the module {module.__name__} has no file that could tell reports its version: "
            "wrap the function in a module of yours."
        )
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:12]

"""Functions of the user from text to text, named as `module:function`."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from types import ModuleType

from voxtral_dist.errors import RankError, UserError, first_line

_TRIAL_TEXT = "Hello, World: 1 2 3."


class OwnFunctionError(RankError):
    """A function of the user that failed on one text."""


@dataclass(frozen=True)
class OwnFunction:
    """A function of the user.

    place: `module:function`. version: the first 12 hexadecimal digits of the SHA-256 of the module's file. apply:
    the function; raises `OwnFunctionError` where it fails or returns no string.
    """

    place: str
    version: str
    apply: Callable[[str], str]

    @property
    def label(self) -> str:
        """Name and version, such as `my_text:clean-1a2b3c4d5e6f`."""
        return f"{self.place}-{self.version}"


def own_function(place: str, kind: str) -> OwnFunction:
    """Import a function of the user, and call it once on a short text.

    Args:
        place: `module:function`, from the working directory or an installed package.
        kind: what it is used as, for messages.

    Raises:
        UserError: it cannot be imported, is no function from text to text, or its module has no source file.
    """
    name = f"The {kind} `{place}`"
    module_name, _, path = place.partition(":")
    module = _imported(module_name, name)
    try:
        function = reduce(getattr, path.split("."), module)
    except AttributeError as error:
        raise UserError(f"{name}: module {module_name} has no attribute `{path}`.") from error
    if not callable(function):
        raise UserError(f"{name} must be a function, but is {function!r} instead.")
    checked = _checked(function, name)
    try:
        checked(_TRIAL_TEXT)
    except OwnFunctionError as error:
        # All ranks try the same text, so that all of them fail.
        raise UserError(str(error)) from error
    return OwnFunction(place, _fingerprint(module, name), checked)


def _imported(module_name: str, name: str) -> ModuleType:
    # As `python -m` does, but last, so that a file there does not shadow an installed package.
    if os.getcwd() not in sys.path:  # noqa: PTH109
        sys.path.append(os.getcwd())  # noqa: PTH109
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{name}: module {module_name} cannot be imported ({type(error).__name__}: {first_line(error)}); it must "
            "be in the working directory or installed."
        ) from error


def _checked(function: Callable[[str], object], name: str) -> Callable[[str], str]:
    def applied(text: str) -> str:
        try:
            result = function(text)
        except Exception as error:
            raise OwnFunctionError(
                f"{name} failed on the text {text!r}: {type(error).__name__}: {first_line(error)}."
            ) from error
        if not isinstance(result, str):
            raise OwnFunctionError(f"{name} must return a string, but returned {result!r} for {text!r} instead.")
        return result

    return applied


def _fingerprint(module: ModuleType, name: str) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the module's file."""
    if module.__spec__ is None or not module.__spec__.has_location or module.__file__ is None:
        raise UserError(
            f"{name}: module {module.__name__} has no source file that gives results a version: wrap the function in a "
            "module of your own."
        )
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:12]

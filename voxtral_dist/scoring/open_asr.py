"""The English normalizer of the Open ASR Leaderboard, imported from a clone of its repository.

It is not copied: its tables of names and compounds state no licence, and it changes several times a month. Run from a
clone, it equals the leaderboard's own by construction, and the label of a result names the commit.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from voxtral_dist.errors import RankError, UserError, first_line

CLONE_VARIABLE = "OPEN_ASR_LEADERBOARD"
_REPOSITORY = "https://github.com/huggingface/open_asr_leaderboard"
_PACKAGE = "_open_asr_normalizer"


def open_asr_english(name: str) -> tuple[str, Callable[[str], str]]:
    """The version and the function of `open_asr_en` or `open_asr_en@COMMIT`.

    The version is the first 12 digits of the clone's commit, and of the SHA-256 of the normalizer's files: a clone may
    hold changes of its own.

    Raises:
        UserError: there is no clone, it is at another commit, or its normalizer cannot be imported.
    """
    wanted = name.partition("@")[2]
    clone = _clone(wanted)
    commit = _commit(clone)
    if not commit.startswith(wanted):
        raise UserError(
            f"The normalizer `{name}`: {clone} is at commit {commit[:12] or 'unknown'}: run `git -C {clone} fetch` and "
            f"`git -C {clone} checkout {wanted}`."
        )
    try:
        function = _imported(clone / "normalizer").EnglishTextNormalizer()
    except (Exception, SystemExit) as error:
        raise UserError(
            f"The normalizer `{name}`: {clone / 'normalizer'} cannot be imported ({type(error).__name__}: "
            f"{first_line(error)})."
        ) from error
    return f"{commit[:12] or 'unknown'}-{_digest(clone / 'normalizer')}", _checked(function, name)


def _clone(wanted: str) -> Path:
    value = os.environ.get(CLONE_VARIABLE, "")
    clone = Path(value)
    if value and (clone / "normalizer" / "normalizer.py").is_file():
        return clone
    checkout = f", `git -C open_asr_leaderboard checkout {wanted}`" if wanted else ""
    found = f"`{CLONE_VARIABLE}` is {value}, which holds no normalizer/normalizer.py" if value else "it needs a clone"
    raise UserError(
        f"The normalizer of the Open ASR Leaderboard is run from its repository; {found}. Run `git clone "
        f"{_REPOSITORY}`{checkout}, and `export {CLONE_VARIABLE}=$PWD/open_asr_leaderboard`."
    )


def _commit(clone: Path) -> str:
    """The commit that is checked out; empty if that is not known, as without `.git`."""
    git = clone / ".git"
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        name = head.removeprefix("ref: ")
        if name == head:
            return head
        if (git / name).is_file():
            return (git / name).read_text(encoding="utf-8").strip()
        packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split()[0] for line in packed if line.endswith(f" {name}")), "")


def _imported(package: Path) -> Any:
    """The module `normalizer.normalizer`, under a name that is in nobody's way."""
    # Only this module and its tables: others import libraries that scoring does not need.
    for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
        del sys.modules[name]
    spec = importlib.util.spec_from_loader(_PACKAGE, loader=None, is_package=True)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__path__ = [str(package)]
    sys.modules[_PACKAGE] = module
    return importlib.import_module(f"{_PACKAGE}.normalizer")


def _digest(package: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(package.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _checked(function: Callable[[str], str], name: str) -> Callable[[str], str]:
    def applied(text: str) -> str:
        try:
            return function(text)
        except Exception as error:
            raise RankError(
                f"The normalizer `{name}` failed on the text {text!r}: {type(error).__name__}: {first_line(error)}."
            ) from error

    return applied

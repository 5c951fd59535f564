"""Folders of exports: complete or absent, with a model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from voxtral_dist.errors import UserError

CARD_FILE = "README.md"


# One of these is in every export, beside weights.
_DESCRIPTIONS = ("config.json", "params.json", "adapter_config.json")
_WEIGHTS = "*.safetensors"
# There is nothing else in an export, and no folder.
_CONTENTS = (_WEIGHTS, "*.json", "*.jinja", CARD_FILE)


def refuse_to_replace_others(option: str, folder: Path) -> None:
    """Refuse to replace a file, or a folder that holds anything else than an export.

    Raises:
        UserError: it would be lost.
    """
    if folder.is_file() or (folder.is_dir() and not _is_replaceable(folder)):
        raise UserError(f"`{option}`: {folder} would be replaced, and is not an export: choose another folder.")


def _is_replaceable(folder: Path) -> bool:
    paths = list(folder.iterdir())
    names = {path.name for path in paths}
    is_export = not names.isdisjoint(_DESCRIPTIONS) and any(fnmatch(name, _WEIGHTS) for name in names)
    return not paths or (is_export and all(_may_be_exported(path) for path in paths))


def _may_be_exported(path: Path) -> bool:
    return path.is_file() and any(fnmatch(path.name, pattern) for pattern in _CONTENTS)


def refuse_inside_model(option: str, folder: Path, model: Path) -> None:
    """Refuse to write an export over the model that it is made from, or into its folder.

    Raises:
        UserError: the model would be lost, or its folder would hold two models.
    """
    out, read = folder.resolve(), model.resolve()
    if read == out or read in out.parents:
        place = "is" if read == out else "lies in"
        raise UserError(f"`{option}`: {folder} {place} the model that would be read: choose another folder.")


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the name of another one, and its place, when the block ends without an error.

    After an error it is removed, because it may hold as much as filled the disk.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def write_card(folder: Path, text: str | None) -> None:
    """Write the model card of a folder, if there is one."""
    if text is not None:
        (folder / CARD_FILE).write_text(text, encoding="utf-8")

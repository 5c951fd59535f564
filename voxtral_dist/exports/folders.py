"""Folders of exports: complete or absent, with a model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from voxtral_dist.errors import UserError

CARD_FILE = "README.md"


# One of these is in every export, and in every model that could be mistaken for one.
_DESCRIPTIONS = ("config.json", "params.json", "adapter_config.json")


def refuse_to_replace_others(option: str, folder: Path) -> None:
    """Refuse to replace a file, or a folder that holds something else than a model.

    Raises:
        UserError: it would be lost.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    is_other = names.isdisjoint(_DESCRIPTIONS) if names else folder.is_file()
    if is_other:
        raise UserError(f"`{option}`: {folder} would be replaced, and is not an export: choose another folder.")


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the name of another one, and its place, when the block ends without an error."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def write_card(folder: Path, text: str | None) -> None:
    """Write the model card of a folder, if there is one."""
    if text is not None:
        (folder / CARD_FILE).write_text(text, encoding="utf-8")

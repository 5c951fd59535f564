"""Files that are whole or not there, whenever their writer is killed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from voxtral_dist.errors import UserError


def refuse_unwritable(option: str, folder: Path, names: Sequence[str] = ()) -> None:
    """Make a folder for results that are yet to be computed.

    Args:
        option: that named it.
        folder: the folder.
        names: of files that will be written there by `write_whole`.

    Raises:
        UserError: it cannot be made, or nothing can be written there; the sentence names the option.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"`{option}`: {folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"`{option}`: {folder} cannot be written: change its owner or choose another.")
    for path in (folder / name for name in names):
        with failures_named(option, path):
            with suppress(FileNotFoundError):
                if stat.S_ISDIR(path.stat().st_mode):
                    raise UserError(f"`{option}`: {path} is a folder, where a file is to be written: choose another.")
            # Other ranks may try at the same time.
            _temporary(path).touch()
            _temporary(path).unlink(missing_ok=True)


def refuse_to_replace(option: str, path: Path, is_result: Callable[[Path], bool]) -> None:
    """Refuse to write over what is no result, such as a manifest of the same name.

    Raises:
        UserError: the file is there, and is none by `is_result`; the sentence names the option.
    """
    with failures_named(option, path):
        exists = path.exists()
    if exists and not is_result(path):
        raise UserError(
            f"`{option}`: {path} would be replaced, and is not known to be a result: choose another folder, or move "
            "the file away."
        )


@contextmanager
def failures_named(option: str, path: Path) -> Iterator[None]:
    """Inside, what the system refuses to write is a mistake about an option.

    Raises:
        UserError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"`{option}`: {path} cannot be written: {error.strerror}.") from error


def readable(text: str) -> str:
    """A text that can be written as UTF-8: bytes of file names that are none become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def write_whole(path: Path, text: str) -> None:
    """Write a text as UTF-8; a reader finds the old file or the new one, and never a part."""
    temporary = _temporary(path)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    """Of a name that is short enough wherever that of the file is."""
    return path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp")

"""Atomic writes, and checks before a long computation that its results can be written."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from voxtral_dist.errors import UserError, WriteError, write_reason

# Errors of a disk, which only writing meets, as opposed to missing files and folders.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


def refuse_unwritable(option: str, folder: Path, names: Sequence[str] = ()) -> None:
    """Create a folder for results before they are computed.

    Args:
        option: the option that names the folder.
        folder: the folder.
        names: names of files that `write_atomically` will write there.

    Raises:
        UserError: the folder cannot be created, or the files cannot be written; the message names the option.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"`{option}`: {folder} cannot be created: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"`{option}`: {folder} cannot be written: change its owner or choose another.")
    for path in (folder / name for name in names):
        with option_named_in_errors(option, path):
            with suppress(FileNotFoundError):
                if stat.S_ISDIR(path.stat().st_mode):
                    raise UserError(
                        f"`{option}`: {path} is a folder, but a file must be written there: choose another."
                    )
            # Other ranks may do the same at the same time.
            _temporary(path).touch()
            _temporary(path).unlink(missing_ok=True)


def refuse_uncreatable(option: str, folder: Path) -> None:
    """Refuse a folder that could neither be made nor written, without making it.

    Raises:
        UserError: it is a file, or this process may not write there.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(
            f"`{option}`: {folder} cannot be created or written: change the owner of {there}, or choose another."
        )


def refuse_to_replace(option: str, path: Path, is_result: Callable[[Path], bool]) -> None:
    """Refuse to overwrite a file that is not a result, such as a manifest of the same name.

    Raises:
        UserError: the file exists and `is_result` is false for it; the message names the option.
    """
    with option_named_in_errors(option, path):
        exists = path.exists()
    if exists and not is_result(path):
        raise UserError(
            f"`{option}`: {path} would be replaced, and is not known to be a result: choose another folder, or move "
            "the file away."
        )


@contextmanager
def option_named_in_errors(option: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` inside the block into a `UserError` that names an option and a path.

    Raises:
        UserError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"`{option}`: {path} cannot be written: {error.strerror}.") from error


@contextmanager
def write_errors_named(what: str, path: Path, numbers: Collection[int] | None = None) -> Iterator[None]:
    """Turn an `OSError` inside the block into a message that says what was to be written where.

    Args:
        what: the beginning of the sentence, such as "The metrics".
        path: the file or folder.
        numbers: errors that are meant wherever they come from; None: all. `DISK_ERRORS` are for blocks that read other
            files too. That `path`, or what was written below it, has been removed is always meant.

    Raises:
        WriteError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        if numbers is not None and error.errno not in numbers and not _was_removed(error, path):
            raise
        raise WriteError(
            f"{what} cannot be written to {path}: {write_reason(error)}. Fix that, and rerun the same command."
        ) from error


def _was_removed(error: OSError, path: Path) -> bool:
    """Whether an error says that there is no such file at or below a path."""
    name = error.filename if isinstance(error, FileNotFoundError) else None
    return isinstance(name, str | os.PathLike) and Path(name).is_relative_to(path)


def encodable(text: str) -> str:
    """A text that UTF-8 can encode: undecodable bytes of file names become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def write_atomically(path: Path, text: str) -> None:
    """Write a text as UTF-8 so that readers find either the old or the new file, never a part of it."""
    temporary = _temporary(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _temporary(path: Path) -> Path:
    """A temporary path whose name is no longer than file systems allow, however long the file's own name is."""
    return path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp")

"""Where the audio that a manifest names may lie, and which of these places exists."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.data.stored.storage import is_remote
from voxtral_dist.output.counting import counted
from voxtral_dist.shards.corpus.suffixes import AUDIO_FILE_SUFFIXES

_FILE_URL = "file://"
_NUM_NAMED = 3


def places_of(name: str, bases: Sequence[Path]) -> tuple[str, ...]:
    """The places where a manifest's audio may lie, in the order in which they are tried.

    Relative names are relative to `bases`, then to the working directory if they name a folder: a bare name that is
    missing beside its manifest must not find another file.
    """
    if is_remote(name):
        return (name,)
    if name.startswith(_FILE_URL):
        name = unquote(name.removeprefix(_FILE_URL).removeprefix("localhost"))
    expanded = os.path.expanduser(name) if name.startswith("~") else name  # noqa: PTH111 (Path changes names like `.`)
    spellings = (expanded, expanded.replace("\\", "/")) if "\\" in expanded else (expanded,)
    places = [str(base / spelling) for spelling in spellings for base in bases]
    places += [spelling for spelling in spellings if "/" in spelling and not spelling.startswith("/")]
    return tuple(dict.fromkeys(places))


def places_below(name: str, folder: Path) -> tuple[str, ...]:
    """`places_of` in one folder: also of an absolute name, which is that of another machine, by its last parts."""
    if is_remote(name):
        return (name,)
    parts = PurePosixPath(name.replace("\\", "/")).parts
    tails = ["/".join(parts[start:]) for start in range(len(parts))]
    relative = [tail for tail in tails if not tail.startswith(("/", "~"))]
    return tuple(str(folder / tail) for tail in relative) or (str(folder / name),)


def existing_place(places: Sequence[str]) -> str:
    """The first place that exists.

    A name is also found in the other Unicode form (Macs decompose umlauts), in another case, and without its suffix.

    Raises:
        UnusableError: there is none, or several files have nearly this name.
    """
    if is_remote(places[0]):
        return places[0]
    for place in places:
        if os.path.lexists(place):
            return place
    for place in places:
        if (found := _nearly(place)) is not None:
            return found
    others = len(places) - _NUM_NAMED
    named = ", ".join(places[:_NUM_NAMED]) + (f" and {counted(others, 'other place')}" if others > 0 else "")
    raise UnusableError(
        Cause.UNREADABLE, f"cannot be read: No such file or directory (looked for {named}); --audio-from names a folder"
    )


def _nearly(place: str) -> str | None:
    """The only file whose path differs in Unicode form, case or a missing suffix; None if there is none."""
    path = Path(place)
    try:
        folder = path.parent if path.parent.is_dir() else _nearly_folder(path.parent)
        if folder is None:
            return None
        names = _folded_names(str(folder))
    except (OSError, ValueError):
        return None
    found = names.get(folded(path.name), ())
    if not found and path.suffix.lower() not in AUDIO_FILE_SUFFIXES:
        found = [name for suffix in AUDIO_FILE_SUFFIXES for name in names.get(f"{folded(path.name)}{suffix}", ())]
    if len(found) > 1:
        raise UnusableError(Cause.UNREADABLE, f"may be one of several files in {folder}: {', '.join(sorted(found))}")
    return str(folder / found[0]) if found else None


def _nearly_folder(folder: Path) -> Path | None:
    if folder.parent == folder:
        return None
    parent = folder.parent if folder.parent.is_dir() else _nearly_folder(folder.parent)
    if parent is None:
        return None
    found = [name for name in _folded_names(str(parent)).get(folded(folder.name), ()) if (parent / name).is_dir()]
    return parent / found[0] if len(found) == 1 else None


def folded(name: str) -> str:
    """A name without its case and Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


@lru_cache(maxsize=8)
def _folded_names(folder: str) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for path in Path(folder).iterdir():
        # A Mac leaves a hidden `._NAME` beside each file that it copies.
        if not path.name.startswith("."):
            names.setdefault(folded(path.name), []).append(path.name)
    return names

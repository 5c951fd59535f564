"""A format of corpora: how it is recognized, and what its reader yields."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist.data.stored.storage import is_remote
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.formats import CorpusFormat
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.utterances import Line


@dataclass(frozen=True)
class CorpusContents:
    """What an importer found in a corpus.

    identity: JSON values that are equal for equal corpora. num_lines: upper limit of utterances; None if unknown.
    read: yields the utterances from the start, any number of times.
    """

    identity: dict[str, Any]
    num_lines: int | None
    read: Callable[[], Iterable[Line]]


@dataclass(frozen=True)
class Importer:
    """The reader of one format.

    recognizes: whether a source is of this format, by names and at most the head of one file.
    open: raises a `UserError` if the source does not exist or is not of the format.
    is_labels: whether it reads names of audio that may be anywhere, so that `audio_from` may be tars or a dataset.
    finds_audio: whether it finds its audio in `audio_from` itself.
    """

    format: CorpusFormat
    recognizes: Callable[[str], bool]
    open: Callable[[str, CorpusOptions], CorpusContents]
    is_labels: bool = False
    finds_audio: bool = False


def digest_file(path: Path) -> tuple[str, int]:
    """The SHA-256 of a manifest and its number of lines.

    Raises:
        UserError: it cannot be read.
    """
    digest, num_lines = hashlib.sha256(), 0
    try:
        with path.open("rb") as contents:
            while part := contents.read(2**20):
                digest.update(part)
                num_lines += part.count(b"\n")
    except OSError as error:
        raise UserError(f"The manifest {path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest(), num_lines


def digest_files(paths: Iterable[Path], folder: Path) -> str:
    """The SHA-256 of the names and contents of manifests in a folder.

    Raises:
        UserError: one cannot be read.
    """
    listing = "\n".join(f"{path.relative_to(folder).as_posix()}\t{digest_file(path)[0]}" for path in paths)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()


def local_manifest(source: str) -> Path:
    """The path of a manifest.

    Raises:
        UserError: it is remote, or does not exist.
    """
    if is_remote(source):
        raise UserError(
            f"The manifest {source} must be a local file: download it. The audio that it names may be remote."
        )
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(
            f"The manifest {path} does not exist: give a file of JSON lines with audio_filepath and text, a table, a "
            "folder of audio or of tars, or hf:NAME."
        )
    return path


def suffix_of(source: str) -> str:
    """The suffix of a manifest in lower case, without that of its compression."""
    path = Path(source)
    return (Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix).lower()

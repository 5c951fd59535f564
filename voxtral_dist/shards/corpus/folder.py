"""Folders of audio files, each with its text in a file beside it, as utterances."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from voxtral_dist.data.stored.checks import Cause
from voxtral_dist.data.stored.storage import read_regular
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.audio_location import AudioLocation
from voxtral_dist.shards.corpus.importer import CorpusContents, Importer, suffix_of
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.other_files import ABOUT, by_stem, conversion, kinds_of, other_files, stem_of
from voxtral_dist.shards.corpus.suffixes import AUDIO_FILE_SUFFIXES
from voxtral_dist.shards.corpus.utterances import Line, Refusal, Utterance, key_of

_LARGEST_TEXT_BYTES = 2**24
# Those of LibriTTS and of the Montreal Forced Aligner, too. The first that exists counts.
_TEXT_SUFFIXES = (".txt", ".original.txt", ".normalized.txt", ".lab")
# LibriSpeech has one file of texts for each chapter: lines of an id and a text.
_CHAPTER_SUFFIX = ".trans.txt"
# TIMIT begins its texts with the first and last sample, and describes phones and words in files beside them.
_TIMIT_TIMES = re.compile(r"\d+\s+\d+\s+")
_TIMIT_SUFFIXES = (".phn", ".wrd")
_TABLES = (".tsv", ".csv", ".jsonl", ".json")
_NUM_NAMED = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderFiles:
    """The files below a folder that are not hidden.

    audio: the audio files, sorted as text, in the same order on every file system.
    names: the names of all files of each folder, by their lower case.
    """

    folder: Path
    audio: Sequence[Path]
    names: Mapping[Path, Mapping[str, str]]

    @cached_property
    def texts(self) -> dict[Path, Path]:
        """The file of the text of each audio file that has one."""
        found = ((path, self._text_of(path)) for path in self.audio)
        return {path: text for path, text in found if text is not None}

    def lonely_texts(self) -> list[Path]:
        """Texts without audio, in folders where other texts have audio."""
        used = set(self.texts.values())
        return sorted(
            folder / name
            for folder in {text.parent for text in used}
            for lower, name in self.names[folder].items()
            if lower.endswith(_TEXT_SUFFIXES[:1]) and folder / name not in used and not self._belongs(folder, lower)
        )

    def _belongs(self, folder: Path, lower: str) -> bool:
        """Whether a text is one of several of an audio file, or about the corpus."""
        stem = lower.removesuffix(".txt").removesuffix(".original").removesuffix(".normalized")
        has_audio = any(f"{stem}{suffix}" in self.names[folder] for suffix in AUDIO_FILE_SUFFIXES)
        return has_audio or lower.endswith(_CHAPTER_SUFFIX) or ABOUT.match(lower) is not None

    def _text_of(self, path: Path) -> Path | None:
        names = self.names[path.parent]
        for suffix in _TEXT_SUFFIXES:
            if (name := names.get(f"{path.stem}{suffix}".lower())) is not None:
                return path.parent / name
        return None


def folder_files(folder: Path) -> FolderFiles:
    """The files of a folder.

    Raises:
        UserError: it does not exist, or holds no audio.
    """
    if not folder.is_dir():
        raise UserError(f"The folder {folder} does not exist: give a folder with audio files and their texts.")
    audio: list[Path] = []
    names: dict[Path, Mapping[str, str]] = {}
    entered = {os.path.realpath(folder)}
    for root, folders, files in os.walk(folder, onerror=_refuse_unreadable, followlinks=True):
        # A Mac leaves `._NAME` beside each file that it copies, and `__MACOSX` in archives.
        inside = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        # A link may lead to a folder above it.
        folders[:] = [name for name in inside if _enter(Path(root) / name, entered)]
        shown = [name for name in files if not name.startswith(".")]
        names[Path(root)] = {name.lower(): name for name in shown}
        audio += [path for name in shown if _is_audio(path := Path(root) / name)]
    if not audio:
        raise UserError(_without_audio(folder, other_files(names)))
    return FolderFiles(folder, sorted(audio, key=lambda path: path.as_posix()), names)


def _refuse_unreadable(error: OSError) -> None:
    """Refuse a folder inside that cannot be read: its utterances would be missing without a word."""
    raise UserError(f"The folder {error.filename} cannot be read: {error.strerror}.") from error


def _enter(folder: Path, entered: set[str]) -> bool:
    """Whether a folder is not in `entered` yet; it is then."""
    real = os.path.realpath(folder)
    is_new = real not in entered
    entered.add(real)
    return is_new


def _without_audio(folder: Path, others: Sequence[Path]) -> str:
    what = f"The folder {folder} holds no audio files, no tars and no dataset"
    if not others:
        return f"{what}: correct the path."
    return f"{what}, only {kinds_of(others)}, such as {others[0]}. {conversion(others[0].name)}"


def _warn_of_other_files(files: FolderFiles) -> None:
    others = other_files(files.names)
    if others:
        log.warning(
            "%d files in %s are not read, because they have no suffix of audio or texts: %s, such as %s. %s",
            len(others),
            files.folder,
            kinds_of(others),
            others[0].relative_to(files.folder),
            conversion(others[0].name),
        )


def read_folder(files: FolderFiles) -> Iterator[Line]:
    """The utterances of a folder, then refusals of texts without audio."""
    chapters: dict[str, str] = {}
    read_from: Path | None = None
    for path in files.audio:
        if path.parent != read_from:
            chapters, read_from = _chapter_texts(path.parent, files.names[path.parent]), path.parent
        key = key_of(path.relative_to(files.folder).as_posix())
        if path.stem in chapters and path not in files.texts:
            yield Utterance(key, AudioLocation(str(path)), chapters[path.stem], None, str(path))
        else:
            yield _read_audio_file(path, key, files)
    others = by_stem(other_files(files.names))
    for path in files.lonely_texts():
        key = key_of(path.relative_to(files.folder).as_posix())
        reason = "there is no audio beside this text"
        if (other := others.get(stem_of(path))) is not None:
            reason += f", only {other}. {conversion(other)}".rstrip(".")
        yield Refusal(str(path), key, Cause.NO_AUDIO, reason)


def _is_audio(path: Path) -> bool:
    """Whether a file has a suffix of audio; a dangling link counts, so that it is refused by name."""
    return path.suffix.lower() in AUDIO_FILE_SUFFIXES


def _chapter_texts(folder: Path, names: Mapping[str, str]) -> dict[str, str]:
    """The texts in LibriSpeech's files of a folder, by id."""
    texts: dict[str, str] = {}
    for name in sorted(real for lower, real in names.items() if lower.endswith(_CHAPTER_SUFFIX)):
        lines = read_regular(folder / name, _LARGEST_TEXT_BYTES).decode("utf-8-sig", "surrogateescape").splitlines()
        texts |= {key: text.strip() for key, _, text in (line.partition(" ") for line in lines) if text.strip()}
    return texts


def _read_audio_file(path: Path, key: str, files: FolderFiles) -> Line:
    """The utterance of an audio file and of the text beside it; refused if there is no text."""
    beside = files.texts.get(path)
    if beside is None:
        missing = path.with_suffix(".txt").name
        return Refusal(str(path), key, Cause.EMPTY_TEXT, f"there is no text beside it: {missing} is missing")
    try:
        text = read_regular(beside, _LARGEST_TEXT_BYTES).decode("utf-8-sig").strip()
    except OSError as error:
        return Refusal(str(path), key, Cause.UNREADABLE, f"its text {beside.name} cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        return Refusal(str(path), key, Cause.EMPTY_TEXT, f"its text {beside.name} is not UTF-8 ({error.reason})")
    if any(f"{path.stem}{suffix}".lower() in files.names[path.parent] for suffix in _TIMIT_SUFFIXES):
        text = _TIMIT_TIMES.sub("", text, count=1)
    if not text:
        return Refusal(str(path), key, Cause.EMPTY_TEXT, f"its text {beside.name} is blank")
    return Utterance(key, AudioLocation(str(path)), text, None, str(path))


def _open(source: str, options: CorpusOptions) -> CorpusContents:
    files = folder_files(Path(source).expanduser())
    _warn_of_other_files(files)
    has_chapters = any(lower.endswith(_CHAPTER_SUFFIX) for names in files.names.values() for lower in names)
    if not files.texts and not has_chapters:
        _refuse_tables(files)
    listed = sorted([*files.audio, *files.texts.values()], key=lambda path: path.as_posix())
    return CorpusContents({"sha256": _digest(listed, files.folder)}, len(files.audio), lambda: read_folder(files))


def _digest(paths: Iterable[Path], folder: Path) -> str:
    listing = "\n".join(f"{path.relative_to(folder).as_posix()}\t{_size(path)}" for path in paths)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()


def _size(path: Path) -> int | None:
    """The size of a file; None for a dangling link."""
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return None


def _refuse_tables(files: FolderFiles) -> None:
    """Refuse a folder whose texts are in tables."""
    tables = sorted(
        str((folder / name).relative_to(files.folder))
        for folder, names in files.names.items()
        for name in names.values()
        if suffix_of(name) in _TABLES
    )
    if tables:
        others = len(tables) - _NUM_NAMED
        named = ", ".join(tables[:_NUM_NAMED]) + (f" and {others} more" if others > 0 else "")
        raise UserError(
            f"The folder {files.folder} has no texts beside its audio. If {named} names audio and texts, pack that "
            "file instead of the folder."
        )


FOLDER = Importer("folder", lambda source: Path(source).expanduser().is_dir(), _open)

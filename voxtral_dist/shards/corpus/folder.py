"""Folders of audio files, each with its text in a file beside it, as utterances."""

from __future__ import annotations

from pathlib import Path

from voxtral_dist.data.stored.checks import Cause
from voxtral_dist.data.stored.layout import AUDIO_SUFFIXES
from voxtral_dist.data.stored.storage import read_regular
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.audio_location import AudioLocation
from voxtral_dist.shards.corpus.utterances import Line, Refusal, Utterance, key_of

_LARGEST_TEXT_BYTES = 2**24
# Also audio that libsndfile cannot decode: such files are refused instead of ignored.
_AUDIO_FILE_SUFFIXES = {f".{name}" for name in AUDIO_SUFFIXES} | {
    ".m4a",
    ".aac",
    ".wma",
    ".webm",
    ".mp4",
    ".sph",
    ".amr",
}


def audio_files(folder: Path) -> list[Path]:
    """The audio files below a folder, sorted as text, in the same order on every file system.

    Raises:
        UserError: the folder does not exist, or holds no audio.
    """
    if not folder.is_dir():
        raise UserError(f"The folder {folder} does not exist: give a folder with audio files and their texts.")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in _AUDIO_FILE_SUFFIXES and path.is_file())
    files = sorted(found, key=lambda path: path.as_posix())
    if not files:
        raise UserError(f"The folder {folder} holds no audio files, no tars and no dataset: correct the path.")
    return files


def read_audio_file(path: Path, folder: Path) -> Line:
    """The utterance of an audio file and of the text beside it; refused if there is no text."""
    key, beside = key_of(path.relative_to(folder).as_posix()), path.with_suffix(".txt")
    try:
        text = read_regular(beside, _LARGEST_TEXT_BYTES).decode("utf-8-sig").strip()
    except FileNotFoundError:
        return Refusal(str(path), key, Cause.EMPTY_TEXT, f"there is no text beside it: {beside.name} is missing")
    except OSError as error:
        return Refusal(str(path), key, Cause.UNREADABLE, f"its text {beside.name} cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        return Refusal(str(path), key, Cause.EMPTY_TEXT, f"its text {beside.name} is not UTF-8 ({error.reason})")
    if not text:
        return Refusal(str(path), key, Cause.EMPTY_TEXT, f"its text {beside.name} is blank")
    return Utterance(key, AudioLocation(str(path)), text, None, str(path))

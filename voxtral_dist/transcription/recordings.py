"""Recordings to transcribe: the audio files among some paths, by the names of their results."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from voxtral_dist.data.stored.audio_kinds import AUDIO_SUFFIXES, MEDIA_SUFFIXES
from voxtral_dist.errors import UserError


@dataclass(frozen=True)
class Recording:
    """An audio file to transcribe.

    Attributes:
        path: where it is.
        name: of the file, or its path inside the folder that was searched; its transcript is named alike.
    """

    path: Path
    name: Path


class RecordingError(UserError):
    """A recording that cannot be transcribed, while others can.

    Example:
        >>> from voxtral_dist import RecordingError, Transcriber
        >>> transcriber = Transcriber.from_pretrained("models/tiny")
        >>> for transcript in transcriber.transcripts(["audio/0_000.flac", "missing.wav"]):
        ...     if isinstance(transcript, RecordingError):
        ...         print(transcript)
        The recording missing.wav cannot be read: No such file or directory.
    """


def find_recordings(paths: Sequence[Path]) -> list[Recording]:
    """The audio files among files and in folders, in the order of the paths; those of a folder by name.

    Raises:
        UserError: a path does not exist, or a folder holds no audio files.
    """
    return [recording for path in paths for recording in (_inside(path) if _is_folder(path) else [_file(path)])]


def refuse_missing_recording(path: Path) -> None:
    """Refuse a path that leads nowhere.

    Raises:
        UserError: it cannot be read.
    """
    _is_folder(path)


def is_audio(path: Path) -> bool:
    """Whether a file has the suffix of audio or video. A dangling link counts, a folder or a pipe does not.

    Files that a Mac writes beside others to hold their attributes (`._NAME`) do not count.
    """
    is_named = path.suffix.lstrip(".").lower() in AUDIO_SUFFIXES | MEDIA_SUFFIXES and not path.name.startswith("._")
    return is_named and (path.is_file() or not path.exists())


def _file(path: Path) -> Recording:
    return Recording(path, Path(path.name))


def _inside(folder: Path) -> list[Recording]:
    found = [Recording(path, path.relative_to(folder)) for path in sorted(folder.rglob("*")) if is_audio(path)]
    if not found:
        suffixes = ", ".join(sorted(AUDIO_SUFFIXES))
        raise UserError(f"The folder {folder} holds no audio: no file in it ends with one of {suffixes}.")
    return found


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        raise UserError(f"The recording {path} cannot be read: {error.strerror}.") from error

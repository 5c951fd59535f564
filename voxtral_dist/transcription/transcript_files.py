"""The files that transcripts are written to, beside no recording's own."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from voxtral_dist.errors import UserError
from voxtral_dist.files import encodable, option_named_in_errors, refuse_unwritable, write_atomically
from voxtral_dist.output.counting import counted
from voxtral_dist.transcription.recordings import Recording, is_audio
from voxtral_dist.transcription.transcripts import RecordingTranscript, TranscriptFormat


def json_row(path: Path, transcript: RecordingTranscript) -> str:
    """A transcript as a line of JSON."""
    row = {"clip": encodable(str(path)), "text": transcript.text, "detected_language": transcript.detected_language}
    return json.dumps(row | asdict(transcript), ensure_ascii=False)


class TranscriptFiles:
    """A folder of transcripts: for each recording a file of its name in each format."""

    def __init__(self, folder: Path, formats: Sequence[TranscriptFormat], recordings: Sequence[Recording]) -> None:
        """Make the folder, and refuse what could not be written there later.

        Raises:
            UserError: the folder cannot be written, two recordings have the same name, a name is too long, or a file
                beside a recording would be replaced: a human may have written it, and `shards pack` reads it as the
                recording's text.
        """
        refuse_unwritable("--out", folder)
        self._folder = folder
        self._formats = tuple(formats)
        self._refuse_equal_names(recordings)
        self._refuse_to_replace_texts(recordings)

    def write(self, recording: Recording, transcript: RecordingTranscript) -> None:
        """Write the files of a recording.

        Raises:
            UserError: a file cannot be written.
        """
        stem = self._stem(recording)
        with option_named_in_errors("--out", stem):
            stem.parent.mkdir(parents=True, exist_ok=True)
            for name in self._formats:
                write_atomically(_with_format(stem, name), _contents(name, recording.path, transcript))

    def _stem(self, recording: Recording) -> Path:
        return self._folder / recording.name.with_suffix("")

    def _refuse_equal_names(self, recordings: Sequence[Recording]) -> None:
        counts = Counter(map(self._stem, recordings))
        twice = next((stem for stem, count in counts.items() if count > 1), None)
        if twice is not None:
            raise UserError(
                f"`--out`: the transcripts of two recordings would be {twice}: transcribe recordings of the same name "
                "into different folders."
            )

    def _refuse_to_replace_texts(self, recordings: Sequence[Recording]) -> None:
        max_bytes = os.pathconf(self._folder, "PC_NAME_MAX")
        folders = {self._stem(recording).parent for recording in recordings}
        audio_stems = {folder: _stems_of_audio(folder) for folder in folders}
        for recording in recordings:
            stem = self._stem(recording)
            for path in (_with_format(stem, name) for name in self._formats):
                if len(os.fsencode(path.name)) > max_bytes:
                    raise UserError(
                        f"`--out`: the name {path.name} is longer than {counted(max_bytes, 'byte')}: rename the "
                        "recording."
                    )
                is_beside = path.exists() and path.parent.samefile(recording.path.parent)
                if is_beside or (path.exists() and stem.name in audio_stems[stem.parent]):
                    raise UserError(
                        f"`--out`: {path} is beside a recording and would be replaced: choose another folder, or move "
                        "the file away if it is an old transcript."
                    )


def _contents(name: TranscriptFormat, path: Path, transcript: RecordingTranscript) -> str:
    match name:
        case "txt":
            return f"{transcript.text}\n"
        case "json":
            return f"{json_row(path, transcript)}\n"
        case "srt":
            return transcript.to_srt()


def _stems_of_audio(folder: Path) -> set[str]:
    """The names without suffixes of the audio files in a folder, which may not exist."""
    return {path.stem for path in folder.iterdir() if is_audio(path)} if folder.is_dir() else set()


def _with_format(stem: Path, name: TranscriptFormat) -> Path:
    return stem.with_name(f"{stem.name}.{name}")

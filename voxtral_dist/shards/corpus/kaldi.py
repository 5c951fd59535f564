"""Data folders of Kaldi as utterances: `wav.scp`, `text`, and where they exist `segments` and `utt2lang`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from voxtral_dist.data.stored.checks import Cause, UnusableError, unusable_on_failure
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.audio_location import AudioLocation
from voxtral_dist.shards.corpus.audio_places import places_below, places_of
from voxtral_dist.shards.corpus.fields import checked_language, checked_seconds, checked_text
from voxtral_dist.shards.corpus.importer import CorpusContents, Importer, digest_files
from voxtral_dist.shards.corpus.manifest_lines import LineTooLongError, ManifestLines
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.utterances import Line, Refusal, Utterance, key_of

_FILES = ("wav.scp", "text", "segments", "utt2lang", "utt2spk", "utt2dur")
_ARCHIVE = re.compile(r"\.ark(:\d+)?$")
_ENTRY = "its wav.scp entry"


@dataclass(frozen=True)
class _Part:
    """A line of `segments`: a recording, and a part of it in seconds; an end of None means to its end."""

    recording: str
    start: float
    end: float | None


def read_kaldi(folder: Path, audio_from: str | None) -> Iterator[Line]:
    """The utterances in the order of `text`, then refusals of those without a text.

    Raises:
        UserError: a file cannot be read, or has an id twice.
    """
    recordings = _mapping(folder / "wav.scp")
    segments = _mapping(folder / "segments") if (folder / "segments").is_file() else None
    optional = {name: _mapping(folder / name) for name in _FILES[3:] if (folder / name).is_file()}
    ids = recordings if segments is None else segments
    said: set[str] = set()
    for number, (key, text) in enumerate(_mapping(folder / "text").items(), 1):
        said.add(key)
        place = f"{folder / 'text'}:{number}"
        try:
            with unusable_on_failure():
                part = _part(key, recordings, segments)
                audio = _audio(part, recordings[part.recording], folder, audio_from, is_whole=segments is None)
                yield _utterance(key, text, audio, part, optional, place)
        except UnusableError as error:
            yield Refusal(place, key_of(f"{key}.utt"), error.cause, f"the utterance {key} {error}")
    for key in ids:
        if key not in said:
            place = str(folder / "text")
            yield Refusal(
                place, key_of(f"{key}.utt"), Cause.EMPTY_TEXT, f"the utterance {key} has no line in this file"
            )


def _utterance(
    key: str, text: str, audio: AudioLocation, part: _Part, optional: Mapping[str, Mapping[str, str]], place: str
) -> Utterance:
    durations = optional.get("utt2dur", {})
    claimed = checked_seconds(durations, key) if part.end is None else part.end - part.start
    speaker = optional.get("utt2spk", {}).get(key)
    return Utterance(
        key=key_of(f"{key}.utt"),
        audio=audio,
        text=checked_text(text, ("text",)),
        language=checked_language(optional.get("utt2lang", {}).get(key)),
        place=place,
        claimed_seconds=claimed,
        extra={"speaker": speaker} if speaker else {},
    )


def _part(key: str, recordings: Mapping[str, str], segments: Mapping[str, str] | None) -> _Part:
    """The part of a recording that an utterance is."""
    if segments is None:
        part = _Part(key, 0.0, None)
    elif key not in segments:
        raise UnusableError(Cause.NO_AUDIO, "names no audio: it has no line in segments")
    else:
        part = _parsed_segment(segments[key])
    if part.recording not in recordings:
        raise UnusableError(Cause.NO_AUDIO, f"names no audio: {part.recording} has no line in wav.scp")
    return part


def _parsed_segment(line: str) -> _Part:
    cells = line.split()
    if len(cells) < 3:
        raise UnusableError(Cause.MALFORMED, f"has the segment {line!r}, which is no recording, start and end")
    # An end of -1 is that of the recording.
    times = {"start": cells[1], "end": "" if cells[2].startswith("-") else cells[2]}
    start, end = checked_seconds(times, "start"), checked_seconds(times, "end")
    if start is None or (end is not None and end <= start):
        raise UnusableError(Cause.MALFORMED, f"has the segment {line!r}, which does not end after its start")
    return _Part(cells[0], start, end)


def _audio(part: _Part, entry: str, folder: Path, audio_from: str | None, *, is_whole: bool) -> AudioLocation:
    if entry.endswith("|"):
        advice = "write its output to a file and name that (Kaldi: wav-copy)"
        raise UnusableError(Cause.UNREADABLE, f"cannot be read: {_ENTRY} is a command ({entry[:80]}): {advice}")
    if _ARCHIVE.search(entry):
        raise UnusableError(Cause.UNREADABLE, f"cannot be read: {_ENTRY} is an archive ({entry}): copy it to files")
    if audio_from is not None:
        places = places_below(entry, Path(audio_from))
    else:
        # Kaldi's paths are those of the folder in which its scripts run, which is above the data folder.
        places = (entry, *places_of(entry, (folder, *list(folder.resolve().parents)[:3])))
    location = AudioLocation(places[0], other_places=places[1:])
    if is_whole or (part.start == 0 and part.end is None):
        return location
    duration = None if part.end is None else part.end - part.start
    return AudioLocation(places[0], None, part.start, duration, other_places=places[1:])


def _mapping(path: Path) -> dict[str, str]:
    """The rest of each line by its first word.

    Raises:
        UserError: the file cannot be read, or has a word twice.
    """
    found: dict[str, str] = {}
    with closing(ManifestLines(path)) as lines:
        try:
            for line in lines:
                key, _, rest = line.strip().replace("\t", " ", 1).partition(" ")
                if not key:
                    continue
                if key in found:
                    raise UserError(f"{path}:{lines.number}: the id {key} is there twice: remove one of its lines.")
                found[key] = rest.strip()
        except LineTooLongError as error:
            raise UserError(f"{path}:{lines.number}: the line is too long: {error}.") from error
    return found


def _is_kaldi(source: str) -> bool:
    folder = Path(source).expanduser()
    return all((folder / name).is_file() for name in _FILES[:2])


def _open(source: str, options: CorpusOptions) -> CorpusContents:
    folder = Path(source).expanduser()
    if not _is_kaldi(source):
        raise UserError(f"The folder {folder} is no data folder of Kaldi: it needs the files wav.scp and text.")
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    return CorpusContents({"sha256": digest_files(files, folder)}, None, lambda: read_kaldi(folder, options.audio_from))


KALDI = Importer("kaldi", _is_kaldi, _open, finds_audio=True)

"""A row of a manifest or table as an utterance."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError, unusable_on_failure
from voxtral_dist.shards.corpus.audio_location import AudioLocation
from voxtral_dist.shards.corpus.fields import FieldNames, checked_language, checked_seconds, checked_text, first_of
from voxtral_dist.shards.corpus.utterances import Line, Refusal, Utterance, key_of

# The places of a name: `places_of` with the folders of a manifest.
Places = Callable[[str], tuple[str, ...]]

# Columns with start and end of a segment, and their unit in seconds.
_SEGMENT_COLUMNS = (
    ("start", "end", 1.0),
    ("start_time", "end_time", 1.0),
    ("begin", "end", 1.0),
    ("begin_time", "end_time", 1.0),
    ("start_seconds", "end_seconds", 1.0),
    ("start_ms", "end_ms", 0.001),
)


@dataclass(frozen=True)
class Segment:
    """The part of a recording that a row is about.

    start: in seconds; None for the whole recording. claimed_seconds: the duration of the part according to the row;
    None if it gives none. or_whole: see `AudioLocation`.
    """

    start: float | None
    claimed_seconds: float | None
    or_whole: bool = False

    def key(self, recording: str) -> str:
        """The key of the part, from that of its recording."""
        return recording if self.start is None else f"{recording}-{round(self.start * 1000):09d}"

    def part_of(self, audio: AudioLocation) -> AudioLocation:
        """The part of the recording."""
        if self.start is None:
            return audio
        return replace(audio, start_seconds=self.start, duration_seconds=self.claimed_seconds, or_whole=self.or_whole)


def row_line(row: Mapping[str, Any], names: FieldNames, places: Places, place: str) -> Line:
    """The utterance of a row, or the refusal of an unusable one."""
    key = ""
    try:
        with unusable_on_failure():
            row = _flattened(row, names)
            key = str(first_of(row, names.audio) or "")
            return row_utterance(row, names, places, place)
    except UnusableError as error:
        return refused(place, key, error)


def refused(place: str, key: str, error: UnusableError) -> Refusal:
    """The refusal of an utterance with this name of its audio; empty if it has none."""
    message = f"the utterance {key} {error}" if key else f"the row {error}"
    return Refusal(place, key_of(key) if key else "", error.cause, message)


def row_utterance(row: Mapping[str, Any], names: FieldNames, places: Places, place: str) -> Utterance:
    """The utterance of a row with the name of its audio.

    Raises:
        UnusableError: the row has no audio, no text, or an unknown language.
    """
    audio = _audio_name(row, names)
    found, *others = places(audio)
    segment = segment_of(row)
    return Utterance(
        key=segment.key(key_of(audio)),
        audio=segment.part_of(AudioLocation(found, other_places=tuple(others))),
        text=checked_text(first_of(row, names.text), names.text),
        language=checked_language(first_of(row, names.language)),
        place=place,
        claimed_seconds=segment.claimed_seconds,
        extra=names.extra(row),
    )


def _flattened(row: Mapping[str, Any], names: FieldNames) -> Mapping[str, Any]:
    """The row with the path of an audio object, `{"path": ..., "start_time": ...}`, in its place."""
    name = next((name for name in names.audio if row.get(name) not in (None, "")), None)
    audio = row.get(name) if name is not None else None
    if name is None or not isinstance(audio, dict):
        return row
    path = audio.get("path")
    if not isinstance(path, str) or not path:
        held = f"only {', '.join(map(str, audio)) or 'nothing'}"
        raise UnusableError(Cause.NO_AUDIO, f"names no audio: its object {name} has no path, {held}")
    times = {key: value for key, value in audio.items() if key not in ("path", "bytes") and key not in row}
    return {**row, **times, name: path}


def _audio_name(row: Mapping[str, Any], names: FieldNames) -> str:
    audio = first_of(row, names.audio)
    if audio is None:
        raise UnusableError(Cause.NO_AUDIO, f"names no audio: it needs one of the fields {', '.join(names.audio)}")
    if not isinstance(audio, str):
        shown = reprlib.repr(audio)
        raise UnusableError(Cause.NO_AUDIO, f"names no audio: {shown} is neither a path nor an object with a path")
    return audio


def segment_of(row: Mapping[str, Any]) -> Segment:
    """The part of the recording that a row is about.

    Raises:
        UnusableError: its times are no numbers, or name no part.
    """
    duration = checked_seconds(row, "duration")
    offset = checked_seconds(row, "offset")
    if offset is not None:
        return Segment(offset, duration)
    for start_name, end_name, unit in _SEGMENT_COLUMNS:
        start, end = checked_seconds(row, start_name), checked_seconds(row, end_name)
        if start is not None and end is not None:
            if end <= start:
                raise UnusableError(Cause.MALFORMED, f"ends at {end_name} {end:g}, not after its start {start:g}")
            return Segment(start * unit, (end - start) * unit, or_whole=True)
        if start is not None and not any(row.get(name) for _, name, _ in _SEGMENT_COLUMNS):
            if duration is None:
                needed = f"neither {end_name} nor duration: name one, or give the column {start_name} another name"
                raise UnusableError(Cause.MALFORMED, f"has {start_name} {start:g}, but {needed}")
            return Segment(start * unit, duration, or_whole=True)
    milliseconds = checked_seconds(row, "duration_ms")
    return Segment(None, milliseconds / 1000 if duration is None and milliseconds is not None else duration)

"""Cuts of Lhotse as utterances."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.data.stored.storage import is_remote
from voxtral_dist.errors import first_line
from voxtral_dist.shards.corpus.audio_location import AudioLocation
from voxtral_dist.shards.corpus.fields import checked_language, checked_seconds, checked_text, first_of
from voxtral_dist.shards.corpus.utterances import Utterance, key_of


def is_cut(row: Mapping[str, Any]) -> bool:
    """Whether a line of JSON is a cut."""
    return "supervisions" in row or str(row.get("type", "")).endswith("Cut")


def read_cut(row: Mapping[str, Any], base: Path, place: str) -> Utterance:
    """The utterance of a cut; paths are relative to `base`.

    Raises:
        UnusableError: the cut names no audio or no text, or is malformed.
    """
    try:
        return _cut_utterance(row, base, place)
    except UnusableError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UnusableError(Cause.MALFORMED, f"is not a valid cut of Lhotse ({what})") from error


def _cut_utterance(row: Mapping[str, Any], base: Path, place: str) -> Utterance:
    """The utterance of a MonoCut: a part of its recording, and the texts of its supervisions, sorted by start."""
    said = [part for part in row.get("supervisions") or [] if isinstance(part, dict)]
    said.sort(key=lambda part: float(part.get("start") or 0.0))
    text = " ".join(part["text"].strip() for part in said if isinstance(part.get("text"), str))
    spoken = first_of(
        {str(number): part.get("language") for number, part in enumerate(said)}, map(str, range(len(said)))
    )
    return Utterance(
        key=key_of(f"{row.get('id', 'cut')}.cut"),
        audio=_cut_audio(row, base),
        text=checked_text(text, ("supervisions",)),
        language=checked_language(spoken),
        place=place,
        claimed_seconds=checked_seconds(row, "duration"),
        extra=_cut_extra(row, said[0]),
    )


def _cut_extra(row: Mapping[str, Any], supervision: Mapping[str, Any]) -> dict[str, Any]:
    """The custom fields of a cut and of its first supervision, and the speaker."""
    attached = [part["custom"] for part in (row, supervision) if isinstance(part.get("custom"), dict)]
    speaker = {"speaker": supervision["speaker"]} if supervision.get("speaker") else {}
    return {name: value for fields in [*attached, speaker] for name, value in fields.items()}


def _cut_audio(row: Mapping[str, Any], base: Path) -> AudioLocation:
    recording = row.get("recording")
    sources = recording.get("sources") if isinstance(recording, dict) else None
    if not isinstance(recording, dict) or not sources or not isinstance(row.get("channel", 0), int):
        raise UnusableError(Cause.NO_AUDIO, "names no audio: it must be a cut of one recording and one channel")
    source = sources[0]
    if len(sources) > 1 or source.get("type") not in ("file", "url") or not isinstance(source.get("source"), str):
        raise UnusableError(Cause.NO_AUDIO, "names no audio: its recording must have one source of type file or url")
    location = source["source"] if is_remote(source["source"]) else str(base / source["source"])
    start_seconds, duration_seconds = checked_seconds(row, "start") or 0.0, checked_seconds(row, "duration")
    several = len(source.get("channels") or [0]) > 1
    whole = start_seconds == 0 and duration_seconds in (None, recording.get("duration")) and not several
    if whole:
        return AudioLocation(location)
    return AudioLocation(location, None, start_seconds, duration_seconds, row.get("channel", 0) if several else None)

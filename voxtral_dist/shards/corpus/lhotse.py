"""Cuts of Lhotse as utterances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.errors import first_line
from voxtral_dist.shards.corpus.audio_location import AudioLocation
from voxtral_dist.shards.corpus.fields import checked_language, checked_seconds, checked_text, first_of
from voxtral_dist.shards.corpus.perturbation import Perturbation
from voxtral_dist.shards.corpus.rows import Places
from voxtral_dist.shards.corpus.utterances import Utterance, key_of

_KNOWN = "Speed, Volume and Resample"


def is_cut(row: Mapping[str, Any]) -> bool:
    """Whether a line of JSON is a cut."""
    return "supervisions" in row or str(row.get("type", "")).endswith("Cut")


def read_cut(row: Mapping[str, Any], places: Places, place: str) -> Utterance:
    """The utterance of a cut; `places` says where its audio may lie.

    Raises:
        UnusableError: the cut names no audio or no text, or is malformed.
    """
    try:
        return cut_utterance(row, _cut_audio(row, places), place)
    except UnusableError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UnusableError(Cause.MALFORMED, f"is not a valid cut of Lhotse ({what})") from error


def cut_utterance(row: Mapping[str, Any], audio: AudioLocation, place: str) -> Utterance:
    """The utterance of a cut with this audio, and the texts of its supervisions, sorted by start."""
    said = [part for part in row.get("supervisions") or [] if isinstance(part, dict)]
    said.sort(key=lambda part: float(part.get("start") or 0.0))
    text = " ".join(part["text"].strip() for part in said if isinstance(part.get("text"), str))
    spoken = first_of(
        {str(number): part.get("language") for number, part in enumerate(said)}, map(str, range(len(said)))
    )
    return Utterance(
        key=key_of(f"{row.get('id', 'cut')}.cut"),
        audio=audio,
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


def _cut_audio(row: Mapping[str, Any], places: Places) -> AudioLocation:
    recording = row.get("recording")
    sources = recording.get("sources") if isinstance(recording, dict) else None
    if not isinstance(recording, dict) or not sources or not isinstance(row.get("channel", 0), int):
        raise UnusableError(Cause.NO_AUDIO, "names no audio: it must be a cut of one recording and one channel")
    source = sources[0]
    if source.get("type") == "shar":
        raise UnusableError(Cause.NO_AUDIO, "names no audio: it is in the tars of Lhotse Shar: pack their folder")
    if len(sources) > 1 or source.get("type") not in ("file", "url") or not isinstance(source.get("source"), str):
        raise UnusableError(Cause.NO_AUDIO, "names no audio: its recording must have one source of type file or url")
    location, *others = places(source["source"])
    start_seconds, duration_seconds = checked_seconds(row, "start") or 0.0, checked_seconds(row, "duration")
    perturbation = perturbation_of(recording)
    several = len(source.get("channels") or [0]) > 1
    if start_seconds == 0 and duration_seconds in (None, recording.get("duration")) and not several:
        return AudioLocation(location, other_places=tuple(others), perturbation=perturbation)
    # The times of a cut are those of the perturbed recording.
    speed = 1.0 if perturbation is None else perturbation.speed
    return AudioLocation(
        location,
        None,
        start_seconds * speed,
        None if duration_seconds is None else duration_seconds * speed,
        row.get("channel", 0) if several else None,
        other_places=tuple(others),
        perturbation=perturbation,
    )


def perturbation_of(recording: Mapping[str, Any]) -> Perturbation | None:
    """What the transforms of a recording ask for; None if they change nothing.

    Raises:
        UnusableError: one of them is not known.
    """
    speed, gain, rate = 1.0, 1.0, None
    for transform in recording.get("transforms") or []:
        name, arguments = transform["name"], transform.get("kwargs") or {}
        if name == "Speed":
            speed *= float(arguments["factor"])
        elif name == "Volume":
            gain *= float(arguments["factor"])
        elif name == "Resample":
            target = int(arguments["target_sampling_rate"])
            rate = target if rate is None else min(rate, target)
        else:
            advice = "save the perturbed audio by lhotse (cuts.save_audios, or to_shar)"
            raise UnusableError(Cause.NO_AUDIO, f"has the transform {name}, but only {_KNOWN} are applied: {advice}")
    if not 0.1 <= speed <= 10 or not 0 < gain <= 1000 or not (rate is None or 1000 <= rate <= 768_000):
        raise UnusableError(Cause.MALFORMED, f"has transforms with speed {speed:g}, gain {gain:g} and rate {rate}")
    changed = Perturbation(speed, gain, rate)
    return None if changed == Perturbation() else changed

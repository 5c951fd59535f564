"""Utterances of tars, wherever their members hold audio, text and language."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError
from voxtral_dist.data.stored.layout import Field, UtteranceLayout
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.stored.utterance import MemberError, StoredUtterance, utterance_of
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.audio_location import AudioLocation
from voxtral_dist.shards.corpus.utterances import Line, Refusal, Utterance, key_of
from voxtral_dist.shards.tars.members import TarDamage
from voxtral_dist.shards.tars.scan import MemberGroup, TarScan

_CAUSE_OF_PART = {
    "audio": Cause.NO_AUDIO,
    "text": Cause.EMPTY_TEXT,
    "instruction": Cause.NO_INSTRUCTION,
    "language": Cause.UNKNOWN_LANGUAGE,
}


def tar_lines(locations: Iterable[str], layout: UtteranceLayout, storage: Storage) -> Iterator[Line]:
    """Utterances and refusals of tars, in the order of their members.

    Raises:
        UserError: a tar cannot be read.
    """
    for location in locations:
        try:
            for found in TarScan(location, storage):
                yield _tar_line(found, location, layout)
        except OSError as error:
            raise UserError(f"The tar {location} cannot be read: {error.strerror or error}.") from error


def _tar_line(found: MemberGroup | TarDamage, location: str, layout: UtteranceLayout) -> Line:
    """The line of a part of a tar."""
    if isinstance(found, TarDamage):
        return Refusal(location, "", Cause.DAMAGED_TAR, str(found))
    place = f"{location}:{found.offset}"
    try:
        return tar_utterance(found, place, layout)
    except UnusableError as error:
        return Refusal(place, found.key, error.cause, f"the sample {found.key} {error}")


def tar_utterance(found: MemberGroup, place: str, layout: UtteranceLayout) -> Utterance:
    """The utterance of a sample in a tar.

    Raises:
        UnusableError: a member is missing, or not what it should be.
    """
    try:
        sample = utterance_of(found.key, found.members, layout)
    except MemberError as error:
        raise UnusableError(_CAUSE_OF_PART[error.part], str(error)) from error
    except ValueError as error:
        raise UnusableError(Cause.NOT_JSON, f"has a member that cannot be read ({error})") from error
    return Utterance(
        key=key_of(f"{sample.key}.tar"),
        audio=AudioLocation(f"{sample.key}.{sample.audio_suffix.rpartition('.')[2]}", sample.audio),
        text=sample.text,
        language=sample.language,
        place=place,
        instruction=sample.instruction,
        extra=_other_fields(sample, layout),
    )


def _other_fields(sample: StoredUtterance, layout: UtteranceLayout) -> dict[str, Any]:
    """What the json of a sample says besides what the layout names."""
    places = (layout.text, layout.language, layout.instruction)
    known = {place.key for place in places if isinstance(place, Field) and place.member == "json"}
    return {name: value for name, value in sample.fields.items() if name not in known}

"""Tars of any layout as utterances."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError, unusable_on_failure
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
    """The utterances of tars, and refusals of unusable ones, in the order of the tars.

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
    """The utterance of a member group; a refusal if it is unusable or damaged."""
    if isinstance(found, TarDamage):
        return Refusal(location, "", Cause.DAMAGED_TAR, str(found))
    place = f"{location}:{found.offset}"
    try:
        with unusable_on_failure():
            return tar_utterance(found, place, layout)
    except UnusableError as error:
        return Refusal(place, found.key, error.cause, f"the utterance {found.key} {error}")


def tar_utterance(group: MemberGroup, place: str, layout: UtteranceLayout) -> Utterance:
    """The utterance of a member group.

    Raises:
        UnusableError: a member is missing or invalid.
    """
    try:
        stored = utterance_of(group.key, group.members, layout)
    except MemberError as error:
        raise UnusableError(_CAUSE_OF_PART[error.part], str(error)) from error
    except ValueError as error:
        raise UnusableError(Cause.NOT_JSON, f"has a member that cannot be read ({error})") from error
    return Utterance(
        key=key_of(f"{stored.key}.tar"),
        audio=AudioLocation(f"{stored.key}.{stored.audio_suffix.rpartition('.')[2]}", stored.audio),
        text=stored.text,
        language=stored.language,
        place=place,
        instruction=stored.instruction,
        extra=_other_fields(stored, layout),
    )


def _other_fields(stored: StoredUtterance, layout: UtteranceLayout) -> dict[str, Any]:
    """The fields of the json member that the layout does not name."""
    places = (layout.text, layout.language, layout.instruction)
    known = {place.key for place in places if isinstance(place, Field) and place.member == "json"}
    return {name: value for name, value in stored.fields.items() if name not in known}

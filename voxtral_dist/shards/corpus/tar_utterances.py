"""Tars of any layout as utterances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError, unusable_on_failure
from voxtral_dist.data.stored.index_files import SHARD_TABLE_FILE
from voxtral_dist.data.stored.layout import Field, UtteranceLayout
from voxtral_dist.data.stored.storage import Storage, is_remote
from voxtral_dist.data.stored.utterance import MemberError, StoredUtterance, utterance_of
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.audio_location import AudioLocation
from voxtral_dist.shards.corpus.fields import FieldNames, checked_language, first_of
from voxtral_dist.shards.corpus.importer import CorpusContents, Importer
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.utterances import Line, Refusal, Utterance, key_of
from voxtral_dist.shards.tars.files import is_tar_pattern, tar_locations
from voxtral_dist.shards.tars.members import TarDamage
from voxtral_dist.shards.tars.scan import MemberGroup, TarScan
from voxtral_dist.text.json_text import parse_json
from voxtral_dist.text.languages import warn_of_shared_code

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
            return tar_utterance(found, place, layout, warn_of_shared_code)
    except UnusableError as error:
        return Refusal(place, found.key, error.cause, f"the utterance {found.key} {error}")


def tar_utterance(
    group: MemberGroup,
    place: str,
    layout: UtteranceLayout,
    on_language: Callable[[Any], None] = lambda label: None,
) -> Utterance:
    """The utterance of a member group.

    Args:
        group: the members.
        place: where they are, for messages.
        layout: which of them are audio, text and language.
        on_language: gets the language as it is written there.

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
        language=_language(stored, layout, on_language),
        place=place,
        instruction=stored.instruction,
        extra=_other_fields(stored, layout),
    )


def _language(stored: StoredUtterance, layout: UtteranceLayout, on_language: Callable[[Any], None]) -> str | None:
    """The language of the layout's place; where that is the usual one and empty, of the names that corpora use."""
    if stored.language is not None or layout.language != UtteranceLayout().language:
        on_language(stored.language_label)
        return stored.language
    return checked_language(first_of(stored.fields, FieldNames().language), on_language)


def _other_fields(stored: StoredUtterance, layout: UtteranceLayout) -> dict[str, Any]:
    """The fields of the json member that the layout does not name."""
    places = (layout.text, layout.language, layout.instruction)
    known = {place.key for place in places if isinstance(place, Field) and place.member == "json"}
    return {name: value for name, value in stored.fields.items() if name not in known}


def is_tars(source: str) -> bool:
    """Whether a source is tars, or a folder with some."""
    if is_tar_pattern(source) or (is_remote(source) and not Path(source).suffix):
        return True
    folder = Path(source)
    return folder.is_dir() and any(is_tar_pattern(path.name) for path in folder.iterdir())


def _open(source: str, options: CorpusOptions) -> CorpusContents:
    storage = Storage()
    locations = tar_locations(source, storage)
    if options.instruction is None:
        _refuse_to_lose_instructions(locations)
    return CorpusContents({"tars": locations}, None, lambda: tar_lines(locations, options.layout, storage))


def _refuse_to_lose_instructions(locations: Iterable[str]) -> None:
    """Refuse answers as transcripts: the index beside tars says which of both their texts are."""
    for folder in sorted({Path(location).parent for location in locations if not is_remote(location)}):
        if _says_answers(folder / SHARD_TABLE_FILE):
            raise UserError(
                f"The texts in {folder} are answers to instructions, not transcripts: pass --instruction-field "
                "instruction, or --instruction TEXT."
            )


def _says_answers(table: Path) -> bool:
    """Whether the texts of a shard set are answers; False if its table is missing or damaged."""
    try:
        return parse_json(table.read_bytes())["layout"]["instruction"] is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False


WEBDATASET = Importer("webdataset", is_tars, _open)

"""One utterance as it is stored: encoded audio, text and language, read from its tar members."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from voxtral_dist.data.stored.audio_kinds import AUDIO_SUFFIXES, MEDIA_SUFFIXES
from voxtral_dist.data.stored.layout import Field, UtteranceLayout
from voxtral_dist.data.stored.tar_members import read_members
from voxtral_dist.text.json_text import parse_json
from voxtral_dist.text.languages import language_code


class MemberError(ValueError):
    """A part of an utterance is missing or invalid. The message is a predicate: callers put the utterance's name
    before it.

    part: audio, text, instruction or language.
    """

    def __init__(self, part: str, message: str) -> None:
        super().__init__(message)
        self.part = part


@dataclass(frozen=True)
class StoredUtterance:
    """One utterance as stored.

    key: its name in WebDataset. audio: the encoded bytes. audio_suffix: such as `flac`.
    text: the transcript, or the answer to the instruction. language: an ISO 639-1 code; None if unknown.
    language_label: the language as it is stored, such as a locale. instruction: what the text answers; None for a
    transcription. fields: everything in its json member.
    """

    key: str
    audio: bytes
    audio_suffix: str
    text: str
    language: str | None
    language_label: Any = None
    instruction: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def parse_utterance(contents: bytes, layout: UtteranceLayout) -> StoredUtterance:
    """The utterance in a run of tar members.

    Raises:
        ValueError: a member is missing or is not what the layout says; `MemberError` if one part is at fault.
        tarfile.TarError: the bytes are not tar members.
    """
    return utterance_of(*read_members(contents), layout)


def utterance_of(key: str, members: Mapping[str, bytes], layout: UtteranceLayout) -> StoredUtterance:
    """The utterance with these members by suffix; raises as `parse_utterance` does."""
    suffix = _audio_suffix(members, layout.audio)
    fields = _Fields(members)
    text = _checked_text(fields.value(layout.text), "text")
    instruction = None
    if layout.instruction is not None:
        instruction = _checked_text(fields.value(layout.instruction), "instruction")
    label = fields.value(layout.language)
    return StoredUtterance(key, members[suffix], suffix, text, _language(label), label, instruction, fields.all_json())


class _Fields:
    """The values in the members of an utterance; each JSON member is parsed once."""

    def __init__(self, members: Mapping[str, bytes]) -> None:
        self._members = members
        self._parsed: dict[str, Mapping[str, Any]] = {}

    def value(self, place: Field | str | None) -> Any:
        """The value at a place, None if there is none; a string, the value of the whole set, is returned as it is."""
        if not isinstance(place, Field):
            return place
        contents = self._members.get(place.member)
        if contents is None:
            return None
        if place.key is None:
            return contents.decode("utf-8-sig").strip()
        return self._parse(place.member).get(place.key)

    def all_json(self) -> Mapping[str, Any]:
        """The fields of the json member; empty if it is missing, or is invalid and the layout doesn't use it."""
        try:
            return self._parse("json")
        except ValueError:
            return {}

    def _parse(self, member: str) -> Mapping[str, Any]:
        if member not in self._members:
            return {}
        if member not in self._parsed:
            fields = parse_json(self._members[member])
            if not isinstance(fields, dict):
                raise ValueError(f"has a {member} member that is no JSON object")
            self._parsed[member] = fields
        return self._parsed[member]


def _checked_text(value: Any, part: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise MemberError(part, f"has no {part}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MemberError(part, f"has {part} that is not valid Unicode ({error.reason})") from error
    return value


def _audio_suffix(members: Mapping[str, bytes], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in members:
            raise MemberError("audio", f"has no {wanted} member for its audio, only {sorted(members)}")
        return wanted
    # A video beside its audio is no second audio.
    found = _with_suffix(members, AUDIO_SUFFIXES) or _with_suffix(members, MEDIA_SUFFIXES)
    if len(found) != 1:
        raise MemberError("audio", f"must have one audio member, but has {found or sorted(members)} instead")
    return found[0]


def _with_suffix(members: Mapping[str, bytes], suffixes: Collection[str]) -> list[str]:
    return sorted(suffix for suffix in members if suffix.rpartition(".")[2] in suffixes)


def _language(label: Any) -> str | None:
    """The ISO 639-1 code as the index has it, even if the label is a locale or the name of a language."""
    try:
        return language_code(label)
    except ValueError as error:
        raise MemberError("language", str(error)) from error

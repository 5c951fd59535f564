"""The members of one stored sample: which of them hold its audio, its text and its language.

A sample is a run of tar members of one key, `KEY.json`, `KEY.flac` and so on. As everywhere in WebDataset, the key ends
at the first dot of the last part of the name.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from voxtral_dist.text.languages import language_code

TAR_BLOCK_BYTES = 512
# What libsndfile decodes. A sample may have other members, such as pictures, which are not looked at.
AUDIO_SUFFIXES = frozenset(
    {"wav", "flac", "mp3", "ogg", "oga", "opus", "aiff", "aif", "au", "w64", "rf64", "caf", "audio"}
)


class MemberError(ValueError):
    """A sample has not what the layout says; the message goes on after its name.

    part: audio, text, instruction or language.
    """

    def __init__(self, part: str, message: str) -> None:
        super().__init__(message)
        self.part = part


@dataclass(frozen=True)
class Field:
    """A place in a sample: a member, and a key in it where it is json."""

    member: str
    key: str | None = None


@dataclass(frozen=True)
class UtteranceLayout:
    """How the samples of a shard set are laid out.

    audio: the suffix of the member with the audio; None where every sample has one audio member.
    text: where the transcript is.
    language: where its ISO 639-1 code is; a text is the language of the whole set, None says that it is not known.
    instruction: where the instruction is that the text answers; a text is that of the whole set, None says that samples
    are transcribed.
    """

    audio: str | None = None
    text: Field = field(default=Field("json", "text"))
    language: Field | str | None = field(default=Field("json", "lang"))
    instruction: Field | str | None = None

    def to_json(self) -> dict[str, Any]:
        """For the shard table."""
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> UtteranceLayout:
        """From the shard table."""
        return cls(
            audio=table["audio"],
            text=Field(**table["text"]),
            language=_place(table["language"]),
            # Indices from before there were instructions have no such key.
            instruction=_place(table.get("instruction")),
        )


@dataclass(frozen=True)
class Sample:
    """One utterance as stored: encoded audio, its text, and its language where that is known.

    instruction: what the text answers; None where it is a transcript. fields: all that its json says.
    """

    key: str
    audio: bytes
    audio_suffix: str
    text: str
    language: str | None
    instruction: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def parse_utterance(contents: bytes, layout: UtteranceLayout) -> Sample:
    """The sample in a run of tar members.

    Raises:
        ValueError: a member is missing or not what the layout says; the sentence goes on after the name of the sample.
        tarfile.TarError: these bytes are not tar members.
    """
    return utterance_of(*read_members(contents), layout)


def read_members(contents: bytes) -> tuple[str, dict[str, bytes]]:
    """The key of a run of tar members, and their contents by suffix.

    Raises:
        tarfile.TarError, ValueError: these bytes are not tar members.
    """
    return _plain_members(contents) or _any_members(contents)


def _plain_members(contents: bytes) -> tuple[str, dict[str, bytes]] | None:
    """The same from plain headers alone, at a tenth of the price; None where there are others, as for long names."""
    members: dict[str, bytes] = {}
    key, offset = "", 0
    while offset < len(contents):
        header = contents[offset : offset + TAR_BLOCK_BYTES]
        offset += TAR_BLOCK_BYTES
        if header[156:157] != tarfile.REGTYPE or header[257:263] != b"ustar\0" or header[124] >= 0x80:
            return None
        size = int(header[124:136].rstrip(b"\0 "), 8)
        prefix, name = header[345:500].rstrip(b"\0"), header[:100].rstrip(b"\0")
        key, suffix = split_name((prefix + b"/" + name if prefix else name).decode("utf-8"))
        members[suffix] = contents[offset : offset + size]
        offset += size + -size % TAR_BLOCK_BYTES
    return key, members


def _any_members(contents: bytes) -> tuple[str, dict[str, bytes]]:
    members: dict[str, bytes] = {}
    key = ""
    with tarfile.open(fileobj=io.BytesIO(contents + bytes(2 * TAR_BLOCK_BYTES)), mode="r:") as tar:
        for member in tar:
            extracted = tar.extractfile(member)
            if extracted is not None:
                key, suffix = split_name(member.name)
                members[suffix] = extracted.read()
    return key, members


def split_name(name: str) -> tuple[str, str]:
    """The key and the suffix of a member: `a/b.c/1.en.json` -> (`a/b.c/1`, `en.json`)."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return folder + slash + stem, suffix.lower()


def utterance_of(key: str, members: Mapping[str, bytes], layout: UtteranceLayout) -> Sample:
    """The sample with these members; see `parse_utterance` for errors."""
    suffix = _audio_suffix(members, layout.audio)
    found = _Places(members)
    text = _checked_text(found.value(layout.text), "text")
    instruction = None
    if layout.instruction is not None:
        instruction = _checked_text(found.value(layout.instruction), "instruction")
    language = _language(found, layout)
    return Sample(key, members[suffix], suffix, text, language, instruction, found.other_fields())


class _Places:
    """The values at places in the members of a sample, each json read once."""

    def __init__(self, members: Mapping[str, bytes]) -> None:
        self._members = members
        self._fields: dict[str, Mapping[str, Any]] = {}

    def value(self, place: Field | str | None) -> Any:
        """What stands at a place, or the value of the whole set; None where nothing does."""
        if not isinstance(place, Field):
            return place
        contents = self._members.get(place.member)
        if contents is None:
            return None
        if place.key is None:
            return contents.decode("utf-8").strip()
        return self.fields(place.member).get(place.key)

    def other_fields(self) -> Mapping[str, Any]:
        """What the json says of the sample; nothing where the layout needs none of it and it cannot be read."""
        try:
            return self.fields("json")
        except ValueError:
            return {}

    def fields(self, member: str) -> Mapping[str, Any]:
        """A json member; empty where there is none."""
        if member not in self._members:
            return {}
        if member not in self._fields:
            fields = json.loads(self._members[member])
            if not isinstance(fields, dict):
                raise ValueError(f"has a {member} member that is no JSON object")
            self._fields[member] = fields
        return self._fields[member]


def _checked_text(value: Any, part: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise MemberError(part, f"has no {part}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MemberError(part, f"has {part} that is not Unicode ({error.reason})") from error
    return value


def _audio_suffix(members: Mapping[str, bytes], wanted: str | None) -> str:
    if wanted is not None:
        if wanted not in members:
            raise MemberError("audio", f"has no {wanted} member with its audio, only {sorted(members)}")
        return wanted
    found = sorted(suffix for suffix in members if suffix.rpartition(".")[2] in AUDIO_SUFFIXES)
    if len(found) != 1:
        raise MemberError("audio", f"must have one audio member, but has {found or sorted(members)} instead")
    return found[0]


def _language(found: _Places, layout: UtteranceLayout) -> str | None:
    """The code, also where a tool wrote a locale or a name: what is trained on is what the index says."""
    try:
        return language_code(found.value(layout.language))
    except ValueError as error:
        raise MemberError("language", str(error)) from error


def _place(stored: Any) -> Field | str | None:
    return Field(**stored) if isinstance(stored, dict) else stored

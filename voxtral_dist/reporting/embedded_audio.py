"""Audio that a report embeds: the bytes of a few utterances as the shards hold them."""

from __future__ import annotations

import base64
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass

from voxtral_dist.data.stored.index import ShardIndex
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.scoring.utterances import ScoredUtterance

# Formats that browsers play, by their first bytes, which are more reliable than file names.
_MEDIA_TYPES = ((b"fLaC", "audio/flac"), (b"OggS", "audio/ogg"), (b"ID3", "audio/mpeg"))
# An MP3 frame begins with eleven set bits, and names layer III.
_MP3_MASK, _MP3_FRAME = 0xFFE6, 0xFFE2


@dataclass(frozen=True)
class EmbeddedAudio:
    """Encoded audio as stored, with its media type."""

    media_type: str
    contents: bytes

    @property
    def uri(self) -> str:
        """The audio as a `data:` URI."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.contents).decode('ascii')}"


@dataclass(frozen=True)
class MissingAudio:
    """Why an utterance has no audio, worded to follow `No audio:`."""

    reason: str


@dataclass(frozen=True)
class AudioLimits:
    """Maximum number of embedded clips, and of their bytes before base64, which makes them a third larger."""

    num_clips: int
    num_bytes: int


@dataclass(frozen=True)
class StoredAudio:
    """The shards that the utterances of a test set are in."""

    index: ShardIndex
    storage: Storage

    def read(self, utterance: ScoredUtterance) -> EmbeddedAudio | MissingAudio:
        """The audio of an utterance, found by its id; its key must match."""
        utterance_id = utterance.decoded.utterance_id
        if not 0 <= utterance_id < len(self.index):
            return MissingAudio(f"the shards have no utterance {utterance_id}")
        try:
            stored = self.index.parse(utterance_id, self.storage.read(self.index.span(utterance_id)))
        except (OSError, ValueError, tarfile.TarError) as error:
            return MissingAudio(f"utterance {utterance_id} cannot be read: {error}")
        if stored.key != utterance.decoded.key:
            return MissingAudio(f"utterance {utterance_id} of the shards is another one, {stored.key!r}")
        kind = media_type(stored.audio)
        if kind is None:
            return MissingAudio(f"browsers do not play .{stored.audio_suffix}")
        return EmbeddedAudio(kind, stored.audio)


def media_type(contents: bytes) -> str | None:
    """The media type of encoded audio; None if browsers do not play it."""
    if contents[:4] == b"RIFF" and contents[8:12] == b"WAVE":
        return "audio/wav"
    if int.from_bytes(contents[:2], "big") & _MP3_MASK == _MP3_FRAME:
        return "audio/mpeg"
    return next((kind for start, kind in _MEDIA_TYPES if contents.startswith(start)), None)


def read_audio(
    numbered: Iterable[tuple[int, ScoredUtterance]], stored: StoredAudio, limits: AudioLimits
) -> dict[int, EmbeddedAudio | MissingAudio]:
    """The audio of the first utterances, by number, within the limits; none is read after the last clip."""
    found: dict[int, EmbeddedAudio | MissingAudio] = {}
    num_left, bytes_left = limits.num_clips, limits.num_bytes
    for number, utterance in numbered:
        if num_left == 0:
            break
        clip = stored.read(utterance)
        if isinstance(clip, EmbeddedAudio) and len(clip.contents) > bytes_left:
            clip = MissingAudio(f"its {len(clip.contents) / 1e6:.2f} MB exceed what `--max-audio-megabytes` leaves")
        found[number] = clip
        if isinstance(clip, EmbeddedAudio):
            num_left, bytes_left = num_left - 1, bytes_left - len(clip.contents)
    return found

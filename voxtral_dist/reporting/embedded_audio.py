"""Audio of a few utterances, as it is stored in the shards."""

from __future__ import annotations

import base64
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass

from voxtral_dist.data.stored.index import ShardIndex
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.scoring.utterances import ScoredUtterance

# What browsers play, by the first bytes: names of members tell less.
_MEDIA_TYPES = ((b"fLaC", "audio/flac"), (b"OggS", "audio/ogg"), (b"ID3", "audio/mpeg"))
# The first eleven bits of an mp3 frame are set, and its layer is the third.
_MP3_MASK, _MP3_FRAME = 0xFFE6, 0xFFE2


@dataclass(frozen=True)
class EmbeddedAudio:
    """Encoded audio as stored, and the media type that it is played by."""

    media_type: str
    contents: bytes

    @property
    def uri(self) -> str:
        """All of it as a `data:` URI."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.contents).decode('ascii')}"


@dataclass(frozen=True)
class MissingAudio:
    """Why an utterance has no audio, as the end of a sentence."""

    reason: str


@dataclass(frozen=True)
class AudioLimits:
    """How many clips are embedded, and how many bytes of them before base64, which makes them a third longer."""

    num_clips: int
    num_bytes: int


@dataclass(frozen=True)
class StoredAudio:
    """The shards that a test set was decoded from."""

    index: ShardIndex
    storage: Storage

    def read(self, utterance: ScoredUtterance) -> EmbeddedAudio | MissingAudio:
        """The audio of an utterance, by the number of its sample; the key must be the same."""
        utterance_id = utterance.decoded.utterance_id
        if not 0 <= utterance_id < len(self.index):
            return MissingAudio(f"the shards have no sample {utterance_id}")
        try:
            sample = self.index.parse(utterance_id, self.storage.read(self.index.span(utterance_id)))
        except (OSError, ValueError, tarfile.TarError) as error:
            return MissingAudio(f"sample {utterance_id} cannot be read: {error}")
        if sample.key != utterance.decoded.key:
            return MissingAudio(f"sample {utterance_id} of the shards is another utterance, {sample.key!r}")
        kind = media_type(sample.audio)
        return (
            MissingAudio(f"browsers do not play .{sample.audio_suffix}")
            if kind is None
            else EmbeddedAudio(kind, sample.audio)
        )


def media_type(contents: bytes) -> str | None:
    """The media type of encoded audio; None where browsers do not play it."""
    if contents[:4] == b"RIFF" and contents[8:12] == b"WAVE":
        return "audio/wav"
    if int.from_bytes(contents[:2], "big") & _MP3_MASK == _MP3_FRAME:
        return "audio/mpeg"
    return next((kind for start, kind in _MEDIA_TYPES if contents.startswith(start)), None)


def read_audio(
    numbered: Iterable[tuple[int, ScoredUtterance]], stored: StoredAudio, limits: AudioLimits
) -> dict[int, EmbeddedAudio | MissingAudio]:
    """The audio of the first utterances, by number, within the limits; those past the number of clips are not tried."""
    found: dict[int, EmbeddedAudio | MissingAudio] = {}
    num_left, bytes_left = limits.num_clips, limits.num_bytes
    for number, utterance in numbered:
        if num_left == 0:
            break
        clip = stored.read(utterance)
        if isinstance(clip, EmbeddedAudio) and len(clip.contents) > bytes_left:
            clip = MissingAudio(
                f"its {len(clip.contents) / 1e6:.2f} MB are more than is left of the limit of the report"
            )
        found[number] = clip
        if isinstance(clip, EmbeddedAudio):
            num_left, bytes_left = num_left - 1, bytes_left - len(clip.contents)
    return found

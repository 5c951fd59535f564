"""Stored utterances, read from their shards by number."""

from __future__ import annotations

from voxtral_dist.data.examples.bad_utterance import BadUtterance, UtteranceError, described
from voxtral_dist.data.stored.index import ShardIndex
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.stored.tar_members import read_members
from voxtral_dist.data.stored.utterance import StoredUtterance
from voxtral_dist.errors import UserError


def read_utterance(index: ShardIndex, utterance_id: int, storage: Storage) -> StoredUtterance:
    """Read an utterance as it is stored.

    Raises:
        UtteranceError: the bytes cannot be read, differ from the indexed ones, or are not the tar members of one
            utterance with audio and text.
        ReadError: the whole shard cannot be read, or its storage fails.
    """
    span, contents = index.span(utterance_id), b""
    try:
        contents = storage.read_indexed(span)
        return index.parse(utterance_id, contents)
    except UserError:
        raise
    except Exception as error:
        # Damaged members raise errors of any type.
        key = _key_in(contents) or f"#{utterance_id}"
        reason = f"cannot be read at byte {span.offset}: {described(error)}"
        raise UtteranceError(BadUtterance(index.shard(utterance_id).name, key, reason)) from error


def _key_in(contents: bytes) -> str | None:
    """The key in the bytes of a damaged utterance; None if no name can be read."""
    try:
        return read_members(contents)[0] or None
    except Exception:
        return None

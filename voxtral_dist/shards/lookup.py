"""A sample of a shard set by its key: the index holds no keys, so the headers of the tars are read."""

from __future__ import annotations

import difflib
import io
import tarfile
from collections.abc import Iterator

from voxtral_dist.data.stored.index import ShardIndex
from voxtral_dist.data.stored.storage import Span, Storage
from voxtral_dist.data.stored.tar_members import split_name
from voxtral_dist.errors import UserError

_RUN_LENGTH = 256
# Enough for a long name, which stands in an extended header of two blocks and more.
_HEADER_BYTES = 4096
# Comparing a wrong key with all keys of a large set would take minutes.
_MAX_COMPARED_KEYS = 20_000


def find_utterance(index: ShardIndex, key: str, storage: Storage) -> int:
    """The number of the sample with this key, or of `#NUMBER`.

    Raises:
        UserError: there is none; the sentence names keys that are like it.
    """
    if key.startswith("#"):
        return _numbered(index, key)
    seen: list[str] = []
    for utterance_id, found in _keys(index, storage):
        if found == key:
            return utterance_id
        if len(seen) < _MAX_COMPARED_KEYS:
            seen.append(found)
    near = difflib.get_close_matches(key, seen, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the first is {seen[0]}."
    raise UserError(f"None of the {len(index)} samples has the key {key!r}: {hint}")


def _numbered(index: ShardIndex, key: str) -> int:
    if not key[1:].isdecimal() or int(key[1:]) >= len(index):
        raise UserError(f"The number of a sample must be from #0 to #{len(index) - 1}, but is {key} instead.")
    return int(key[1:])


def _keys(index: ShardIndex, storage: Storage) -> Iterator[tuple[int, str]]:
    for first_id in range(0, len(index), _RUN_LENGTH):
        heads = {utterance_id: _head(index.span(utterance_id)) for utterance_id in _run(first_id, len(index))}
        storage.prefetch(heads.values())
        for utterance_id, head in heads.items():
            yield utterance_id, _key(storage.read(head), utterance_id)


def _run(first_id: int, num_utterances: int) -> range:
    return range(first_id, min(first_id + _RUN_LENGTH, num_utterances))


def _head(span: Span) -> Span:
    return Span(span.location, span.offset, min(span.num_bytes, _HEADER_BYTES))


def _key(head: bytes, utterance_id: int) -> str:
    try:
        with tarfile.open(fileobj=io.BytesIO(head), mode="r:") as tar:
            first = tar.next()
    except tarfile.TarError:
        first = None
    # A damaged sample has no key that could be asked for.
    return f"#{utterance_id}" if first is None else split_name(first.name)[0]

"""A set that is packed to a URL: a finished shard is uploaded, and then what the journal says of it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from voxtral_dist.config import StorageConfig
from voxtral_dist.data.stored.index_files import INDEX_FILE, SHARD_TABLE_FILE
from voxtral_dist.data.stored.storage import MissingFileError, join
from voxtral_dist.data.stored.storage.remote import Remote
from voxtral_dist.errors import UserError, first_line
from voxtral_dist.output.masking import masked
from voxtral_dist.shards.corpus.parts import CorpusPart
from voxtral_dist.shards.skipped import SKIPPED_FILE
from voxtral_dist.text.json_text import parse_json

_PLAIN_STATE = ".packing"


class RemoteSet:
    """A set at a URL, and the journal of one packing into it.

    The journal is a folder of entries, `000000.json` and so on: objects cannot be appended to. An entry holds what one
    finished shard added to each file of the local journal, in base64.
    """

    def __init__(self, url: str, part: CorpusPart | None = None) -> None:
        """Connect to nothing yet."""
        self.url = url.rstrip("/")
        self._remote = Remote(StorageConfig())
        self._entries = join(self.url, _PLAIN_STATE if part is None else f".part-{part.name}")
        self._num_entries = 0
        self._saved: dict[str, int] = {}

    def __str__(self) -> str:
        return masked(self.url)

    def sizes(self) -> dict[str, int]:
        """Names and sizes of the files of the set; none where it does not exist."""
        return self._sizes(self.url)

    def folders(self) -> list[str]:
        """Names of the folders in that of the set, in which journals are."""
        return self._remote.folders(self.url)

    def has_entries(self) -> bool:
        """Whether a packing has left a journal."""
        return bool(self._sizes(self._entries))

    def identity(self) -> Any:
        """What the packing of the journal was called with; None if there is no journal, or it is damaged."""
        try:
            entry = parse_json(self._remote.read_whole(join(self._entries, _entry_name(0))))
            return next(iter(map(parse_json, base64.b64decode(_journal_of(entry)).splitlines())), None)
        except (MissingFileError, ValueError, AttributeError, TypeError):
            return None

    def restore(self, paths: Sequence[Path]) -> None:
        """Write the files of the journal, as far as they were uploaded, into a local folder.

        Raises:
            UserError: an entry is damaged.
        """
        names = sorted(self._sizes(self._entries))
        for path in paths:
            path.write_bytes(b"")
        for number, name in enumerate(names):
            try:
                if name != _entry_name(number):
                    raise ValueError("an entry is missing")
                entry = parse_json(self._remote.read_whole(join(self._entries, name)))
                added = [base64.b64decode(entry[path.name], validate=True) for path in paths]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"The journal {masked(self._entries)} is damaged at {name}: remove this folder, and pack again."
                ) from error
            for path, contents in zip(paths, added, strict=True):
                with path.open("ab") as file:
                    file.write(contents)
        self._num_entries = len(names)
        self._saved = {path.name: path.stat().st_size for path in paths}

    def save(self, paths: Sequence[Path]) -> None:
        """Upload what the files of the journal have that was not uploaded."""
        entry = {}
        for path in paths:
            with path.open("rb") as file:
                file.seek(self._saved[path.name])
                entry[path.name] = base64.b64encode(file.read()).decode("ascii")
        self._upload_text(json.dumps(entry), join(self._entries, _entry_name(self._num_entries)))
        self._num_entries += 1
        self._saved = {path.name: path.stat().st_size for path in paths}

    def move_shard(self, path: Path) -> None:
        """Upload a finished shard, and remove it from this machine."""
        self._remote.upload(path, join(self.url, path.name))
        path.unlink()

    def publish(self, folder: Path) -> None:
        """Upload the index and `skipped.jsonl`; the shard table comes last, so that it marks the set as complete."""
        names = [INDEX_FILE, SHARD_TABLE_FILE]
        if (folder / SKIPPED_FILE).is_file() and (folder / SKIPPED_FILE).stat().st_size:
            names.insert(0, SKIPPED_FILE)
        for name in names:
            self._remote.upload(folder / name, join(self.url, name))

    def fetch_skipped(self, folder: Path) -> None:
        """Download `skipped.jsonl` if there is one."""
        if SKIPPED_FILE in self.sizes():
            self._remote.download(join(self.url, SKIPPED_FILE), folder / SKIPPED_FILE)

    def discard(self) -> None:
        """Remove the journal; the first entry comes last, because it says whose journal this is."""
        for name in sorted(self._sizes(self._entries), reverse=True):
            self._remote.remove(join(self._entries, name))

    def _sizes(self, folder: str) -> dict[str, int]:
        try:
            return self._remote.sizes(folder)
        except MissingFileError:
            return {}

    def _upload_text(self, text: str, location: str) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "entry"
            path.write_text(text, encoding="utf-8")
            self._remote.upload(path, location)


@contextmanager
def storage_errors_named(url: str) -> Iterator[None]:
    """Turn an error of a server inside the block into one sentence.

    Raises:
        UserError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The set {masked(url)} cannot be written: {first_line(error).rstrip('.')}. Fix that, and rerun the same "
            "command to resume after the finished shards."
        ) from error


def _entry_name(number: int) -> str:
    return f"{number:06d}.json"


def _journal_of(entry: dict[str, str]) -> str:
    return next(text for name, text in entry.items() if name.endswith(".jsonl") and name.startswith("."))

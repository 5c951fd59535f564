"""Lhotse Shar as utterances: cuts in `cuts.N.jsonl.gz`, and the audio of each in `recording.N.tar`."""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError, unusable_on_failure
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.audio_location import AudioLocation
from voxtral_dist.shards.corpus.importer import CorpusContents, Importer, digest_files
from voxtral_dist.shards.corpus.lhotse import cut_utterance
from voxtral_dist.shards.corpus.manifests import json_rows
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.rows import refused
from voxtral_dist.shards.corpus.tar_files import TarFile, tar_files
from voxtral_dist.shards.corpus.utterances import Line, Refusal, key_of

_CUTS = re.compile(r"cuts\.(?P<shard>.+)\.jsonl(\.gz)?")
# Lhotse writes these where a cut has no audio.
_PLACEHOLDERS = (".nodata", ".nometa")


def read_shar(shards: Sequence[tuple[Path, Path]]) -> Iterator[Line]:
    """The utterances of pairs of cuts and tar, in the order of the tars; then refusals of cuts without audio.

    Raises:
        UserError: a file cannot be read.
    """
    for cuts, tar in shards:
        waiting: defaultdict[str, deque[tuple[str, dict[str, Any]]]] = defaultdict(deque)
        for place, row in json_rows(cuts):
            if isinstance(row, Refusal):
                yield row
            else:
                waiting[str(row.get("id"))].append((place, row))
        for found in tar_files(str(tar)):
            if isinstance(found, Refusal):
                yield found
            elif not found.name.endswith((".json", *_PLACEHOLDERS)):
                yield _utterance(found, waiting)
        for key, rows in waiting.items():
            for place, _ in rows:
                yield Refusal(place, key_of(f"{key}.cut"), Cause.NO_AUDIO, f"the cut {key} has no audio in {tar.name}")


def _utterance(file: TarFile, waiting: Mapping[str, deque[tuple[str, dict[str, Any]]]]) -> Line:
    path = PurePosixPath(file.name)
    cut_id = str(path.with_suffix(""))
    rows = waiting.get(cut_id)
    if not rows:
        return Refusal(file.place, key_of(file.name), Cause.EMPTY_TEXT, f"the audio {file.name} has no cut of its id")
    place, row = rows.popleft()
    try:
        with unusable_on_failure():
            if row.get("type") != "MonoCut" or not isinstance(row.get("channel", 0), int):
                kind = row.get("type")
                raise UnusableError(Cause.NO_AUDIO, f"names no audio of one channel: its type is {kind}, not MonoCut")
            return cut_utterance(row, AudioLocation(f"{key_of(file.name)}{path.suffix}", file.contents), place)
    except UnusableError as error:
        return refused(place, cut_id, error)


def _shards(folder: Path) -> list[tuple[Path, Path]]:
    """The files of cuts and the tars of their audio; a tar that is missing is named nevertheless."""
    found = ((path, match["shard"]) for path in sorted(folder.iterdir()) if (match := _CUTS.fullmatch(path.name)))
    return [(path, folder / f"recording.{shard}.tar") for path, shard in found]


def _is_shar(source: str) -> bool:
    folder = Path(source).expanduser()
    return folder.is_dir() and any(tar.is_file() for _, tar in _shards(folder))


def _open(source: str, options: CorpusOptions) -> CorpusContents:
    folder = Path(source).expanduser()
    if not _is_shar(source):
        raise UserError(
            f"The folder {folder} is no Lhotse Shar with audio: it needs cuts.N.jsonl.gz and recording.N.tar."
        )
    shards = _shards(folder)
    missing = [tar.name for _, tar in shards if not tar.is_file()]
    if missing:
        raise UserError(f"The Lhotse Shar {folder} lacks {', '.join(missing)}: copy it, or remove its cuts.")
    identity = {"sha256": digest_files([cuts for cuts, _ in shards], folder)}
    return CorpusContents(identity, None, lambda: read_shar(shards))


LHOTSE_SHAR = Importer("lhotse_shar", _is_shar, _open)

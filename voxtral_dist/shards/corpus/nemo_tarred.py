"""Tarred sets of NeMo: audio in `audio_N.tar`, its texts in `tarred_audio_manifest.json` by name and `shard_id`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from voxtral_dist.data.stored.checks import Cause
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.fields import FieldNames, first_of
from voxtral_dist.shards.corpus.importer import CorpusContents, Importer, digest_file
from voxtral_dist.shards.corpus.label_spool import LabelSpool, joined, without_audio
from voxtral_dist.shards.corpus.manifests import json_rows
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.rows import row_line
from voxtral_dist.shards.corpus.suffixes import AUDIO_FILE_SUFFIXES
from voxtral_dist.shards.corpus.table_dialect import first_lines
from voxtral_dist.shards.corpus.tar_files import tar_files
from voxtral_dist.shards.corpus.utterances import Line, Refusal
from voxtral_dist.shards.tars.files import is_tar_pattern, tar_locations
from voxtral_dist.text.json_text import parse_json

_MANIFEST = re.compile(r"tarred_audio_manifest(_version_(?P<version>\d+))?\.json")
_SHARDED = "sharded_manifests/manifest_*.json"
_TAR = re.compile(r"audio_\d+\.")
_LAST_NUMBER = re.compile(r"(\d+)\D*$")
# A file that several rows cut: all but the first say `NAME-sub1.wav`, `NAME-sub2.wav` and so on.
_SUB = re.compile(r"-sub\d+(?=\.[^.]*$|$)")


@dataclass(frozen=True)
class _Bucket:
    """A manifest, or one for each shard, and the tars of its shards by number."""

    manifests: Sequence[Path]
    tars: dict[int, str]
    is_part: bool


def read_tarred(buckets: Sequence[_Bucket], names: FieldNames) -> Iterator[Line]:
    """The utterances in the order of the tars, then refusals of rows without audio.

    Raises:
        UserError: a manifest or tar cannot be read.
    """
    for bucket in buckets:
        spool = LabelSpool()
        for manifest in bucket.manifests:
            yield from _spool(manifest, spool, bucket, names)
        for number, tar in sorted(bucket.tars.items()):
            for found in tar_files(tar):
                if isinstance(found, Refusal):
                    yield found
                elif Path(found.name).suffix.lower() in AUDIO_FILE_SUFFIXES:
                    yield from joined(spool, found.name, found.contents, found.place, str(number))
        yield from without_audio(spool, "the tar of its shard")


def _spool(manifest: Path, spool: LabelSpool, bucket: _Bucket, names: FieldNames) -> Iterator[Refusal]:
    """Keep the rows of a manifest; yields refusals of unusable ones."""
    for place, row in json_rows(manifest):
        if isinstance(row, Refusal):
            yield row
            continue
        shard = row.get("shard_id", _number(manifest.name))
        line = row_line(row, names, lambda name: (name,), place)
        if not isinstance(shard, int) or shard not in bucket.tars:
            if not bucket.is_part:
                key = line.key
                yield Refusal(
                    place, key, Cause.NO_AUDIO, f"the utterance {key} is in the shard {shard!r}, which has no tar"
                )
            continue
        name = str(first_of(row, names.audio))
        spool.add(line, _SUB.sub("", name), str(shard))
        if isinstance(line, Refusal):
            yield line


def _number(name: str) -> int | None:
    found = _LAST_NUMBER.search(Path(name).stem)
    return int(found[1]) if found else None


def _braced(source: str) -> str:
    """A pattern with the braces for which NeMo writes `_OP_` and `_CL_`."""
    return source.replace("_OP_", "{").replace("_CL_", "}")


def _newest_manifest(folder: Path) -> Path | None:
    """The manifest of a folder; a later version includes the earlier ones."""
    if not folder.is_dir():
        return None
    found = [
        (int(match["version"] or 0), path) for path in folder.iterdir() if (match := _MANIFEST.fullmatch(path.name))
    ]
    return max(found)[1] if found else None


def _manifests(folder: Path) -> list[Path]:
    newest = _newest_manifest(folder)
    return [newest] if newest is not None else sorted(folder.glob(_SHARDED))


def _is_tarred_manifest(path: Path) -> bool:
    if not path.is_file() or path.suffix not in (".json", ".jsonl"):
        return False
    try:
        row = parse_json("".join(first_lines(path, 1)))
    except ValueError:
        return False
    return isinstance(row, dict) and "shard_id" in row


def _buckets(source: str, audio_from: str | None) -> list[_Bucket]:
    """The buckets of a source: a folder, a folder of buckets, a manifest, or a pattern of manifests or tars."""
    pattern = _braced(source)
    if is_tar_pattern(pattern):
        tars = tar_locations(pattern, Storage())
        folders = sorted({Path(tar).parent for tar in tars})
        return [
            _Bucket(manifests, _numbered([tar for tar in tars if Path(tar).parent == folder]), is_part=True)
            for folder in folders
            if (manifests := _manifests(folder))
        ]
    if Path(pattern).is_dir():
        folder = Path(pattern)
        found = [folder] if _manifests(folder) else sorted(path for path in folder.iterdir() if path.is_dir())
        groups = [manifests for one in found if (manifests := _manifests(one))]
    else:
        paths = [Path(name) for name in Storage().expand(pattern)]
        sharded = [path for path in paths if path.parent.name == Path(_SHARDED).parent.name]
        groups = [[path] for path in paths if path not in sharded and _is_tarred_manifest(path)]
        groups += [sharded] if sharded else []
    return [_Bucket(group, _numbered(_tars_of(group[0], audio_from)), is_part=False) for group in groups]


def _tars_of(manifest: Path, audio_from: str | None) -> list[str]:
    if audio_from is not None:
        return tar_locations(_braced(audio_from), Storage())
    folder = manifest.parent.parent if manifest.parent.name == Path(_SHARDED).parent.name else manifest.parent
    tars = [path for path in folder.iterdir() if is_tar_pattern(path.name) and not path.name.startswith(".")]
    # Where some have NeMo's names, others hold something else.
    return [str(path) for path in tars if _TAR.match(path.name)] or [str(path) for path in tars]


def _numbered(tars: Sequence[str]) -> dict[int, str]:
    numbered: dict[int, str] = {}
    for tar in tars:
        number = _number(tar)
        if number is None or number in numbered:
            other = f", as has {numbered[number]}" if number is not None else ""
            raise UserError(f"The tar {tar} has {'no number' if number is None else f'the number {number}'}{other}.")
        numbered[number] = tar
    return numbered


def _is_tarred(source: str) -> bool:
    pattern = _braced(source)
    if pattern != source:
        return True
    path = Path(source)
    if is_tar_pattern(source):
        return bool(_manifests(path.parent))
    if not path.is_dir():
        return _MANIFEST.fullmatch(path.name) is not None or _is_tarred_manifest(path)
    return bool(_manifests(path)) or any(_manifests(one) for one in path.iterdir() if one.is_dir())


def _open(source: str, options: CorpusOptions) -> CorpusContents:
    buckets = _buckets(source, options.audio_from)
    if not buckets or not all(bucket.tars for bucket in buckets):
        raise UserError(
            f"The tarred set of NeMo {source} needs both tarred_audio_manifest.json and audio_N.tar: name the tars by "
            "--audio-from if they lie elsewhere."
        )
    digests = [digest_file(path)[0] for bucket in buckets for path in bucket.manifests]
    identity = {"sha256": digests, "tars": [tar for bucket in buckets for tar in bucket.tars.values()]}
    return CorpusContents(identity, None, lambda: read_tarred(buckets, options.names))


NEMO_TARRED = Importer("nemo_tarred", _is_tarred, _open, finds_audio=True)

"""YODAS as it is on the hub: audio in `audio/N.tar.gz`, texts in `text/N.txt`, or `text/N.json` with times."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from voxtral_dist.data.stored.checks import Cause, UnusableError, unusable_on_failure
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.audio_location import AudioLocation
from voxtral_dist.shards.corpus.fields import checked_language, checked_text
from voxtral_dist.shards.corpus.importer import CorpusContents, Importer, digest_files
from voxtral_dist.shards.corpus.label_spool import LabelSpool, joined, without_audio
from voxtral_dist.shards.corpus.manifest_lines import ManifestLines
from voxtral_dist.shards.corpus.manifests import json_rows
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.suffixes import AUDIO_FILE_SUFFIXES
from voxtral_dist.shards.corpus.tar_files import tar_files
from voxtral_dist.shards.corpus.utterances import Line, Refusal, Utterance, key_of

# The folder of a language with manual (0) or automatic (1) captions, and the number of a part: `de000`, `en103`.
_FOLDER = re.compile(r"([a-z]{2,3})\d{3}")
# An id of YODAS 2 ends in the start and end of the utterance in hundredths of a second.
_TIMES = re.compile(r"-(\d+)-(\d+)$")
_TARS = (".tar.gz", ".tgz", ".tar")


def read_yodas(parts: list[tuple[Path, Path]], language: str | None) -> Iterator[Line]:
    """The utterances of pairs of texts and tar, in the order of the tars; then refusals of texts without audio.

    Raises:
        UserError: a file cannot be read.
    """
    for texts, tar in parts:
        spool = LabelSpool()
        for name, line in (_recordings if texts.suffix == ".json" else _utterances)(texts, language):
            spool.add(line, name)
            if isinstance(line, Refusal):
                yield line
        for found in tar_files(str(tar)):
            if isinstance(found, Refusal):
                yield found
            elif Path(found.name).suffix.lower() in AUDIO_FILE_SUFFIXES:
                yield from joined(spool, found.name, found.contents, found.place)
        yield from without_audio(spool, tar.name)


def _utterances(texts: Path, language: str | None) -> Iterator[tuple[str, Line]]:
    """The lines of YODAS 1: the id of an utterance, which is the name of its audio, and its text."""
    with closing(ManifestLines(texts)) as lines:
        for line in lines:
            name, _, text = line.strip().partition(" ")
            if name:
                yield name, _labelled(name, text, AudioLocation(name), None, language, f"{texts}:{lines.number}")


def _recordings(texts: Path, language: str | None) -> Iterator[tuple[str, Line]]:
    """The utterances of YODAS 2: parts of recordings."""
    for place, row in json_rows(texts):
        if isinstance(row, Refusal):
            yield "", row
            continue
        name, said = str(row.get("audio_id", "")), row.get("text")
        for key, text in (said if isinstance(said, dict) else {"": said}).items():
            times = _TIMES.search(key)
            if times is None:
                message = f"the utterance {key or name} has no times in its id"
                yield name, Refusal(place, key_of(f"{name}.yodas"), Cause.MALFORMED, message)
                continue
            start, end = int(times[1]) / 100, int(times[2]) / 100
            yield (
                name,
                _labelled(key, text, AudioLocation(name, None, start, end - start), end - start, language, place),
            )


def _labelled(
    key: str, text: Any, audio: AudioLocation, seconds: float | None, language: str | None, place: str
) -> Line:
    try:
        with unusable_on_failure():
            said = checked_text(text, ("text",))
            return Utterance(key_of(f"{key}.yodas"), audio, said, checked_language(language), place, None, seconds)
    except UnusableError as error:
        return Refusal(place, key_of(f"{key}.yodas"), error.cause, f"the utterance {key} {error}")


def _parts(folder: Path) -> list[tuple[Path, Path | None]]:
    """The files of texts and the tars of their audio; None for a tar that is missing."""
    texts = sorted(path for path in (folder / "text").glob("*") if path.suffix in (".txt", ".json"))
    return [(path, _tar(folder / "audio", path.stem)) for path in texts]


def _tar(folder: Path, stem: str) -> Path | None:
    return next((folder / f"{stem}{suffix}" for suffix in _TARS if (folder / f"{stem}{suffix}").is_file()), None)


def _is_yodas(source: str) -> bool:
    return any(tar is not None for _, tar in _parts(Path(source).expanduser()))


def _open(source: str, options: CorpusOptions) -> CorpusContents:
    folder = Path(source).expanduser()
    parts = [(texts, tar) for texts, tar in _parts(folder) if tar is not None]
    missing = [texts.name for texts, tar in _parts(folder) if tar is None]
    if missing or not parts:
        what = f"the audio of text/{missing[0]}" if missing else "text/N.txt and audio/N.tar.gz"
        raise UserError(f"The folder {folder} of YODAS lacks {what}: download it, or remove its texts.")
    named = _FOLDER.fullmatch(folder.name)
    language = options.language or (named[1] if named else None)
    identity = {"sha256": digest_files([texts for texts, _ in parts], folder), "language": language}
    return CorpusContents(identity, None, partial(read_yodas, parts, language))


YODAS = Importer("yodas", _is_yodas, _open)

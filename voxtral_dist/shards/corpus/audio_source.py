"""Tars and datasets with the audio of a corpus whose labels are elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.shards.corpus.fields import FieldNames
from voxtral_dist.shards.corpus.huggingface import dataset_files, is_dataset
from voxtral_dist.shards.corpus.importer import CorpusContents
from voxtral_dist.shards.corpus.label_spool import LabelSpool, joined, without_audio
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.suffixes import AUDIO_FILE_SUFFIXES
from voxtral_dist.shards.corpus.tar_files import TarFile, tar_files
from voxtral_dist.shards.corpus.tar_utterances import is_tars
from voxtral_dist.shards.corpus.utterances import Line, Refusal
from voxtral_dist.shards.tars.files import tar_locations


def is_audio_source(place: str) -> bool:
    """Whether a place holds audio in tars or a dataset, and not in files of a folder."""
    return is_tars(place) or is_dataset(place)


def with_audio_of(labels: CorpusContents, options: CorpusOptions) -> CorpusContents:
    """The corpus of these labels, in the order of their audio, which is found by its name.

    Labels without audio, and audio without labels, are refused by name.
    """
    place = options.audio_from or ""
    return CorpusContents(labels.identity, None, lambda: _joined_lines(labels, place, options.names))


def _joined_lines(labels: CorpusContents, place: str, names: FieldNames) -> Iterator[Line]:
    spool = LabelSpool()
    for line in labels.read():
        if isinstance(line, Refusal):
            spool.add(line, "")
            yield line
        else:
            spool.add(line, line.audio.location)
    for found in _files(place, names):
        if isinstance(found, Refusal):
            yield found
        elif Path(found.name).suffix.lower() in AUDIO_FILE_SUFFIXES:
            yield from joined(spool, found.name, found.contents, found.place)
    yield from without_audio(spool, place)


def _files(place: str, names: FieldNames) -> Iterator[TarFile | Refusal]:
    if is_dataset(place):
        yield from dataset_files(place, names)
        return
    for tar in tar_locations(place, Storage()):
        yield from tar_files(tar)

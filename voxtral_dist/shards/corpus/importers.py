"""The importers of all formats, and the choice among them."""

from __future__ import annotations

from voxtral_dist.shards.corpus.audiofolder import AUDIO_FOLDER
from voxtral_dist.shards.corpus.folder import FOLDER
from voxtral_dist.shards.corpus.formats import CorpusFormat
from voxtral_dist.shards.corpus.huggingface import HUGGINGFACE
from voxtral_dist.shards.corpus.importer import Importer
from voxtral_dist.shards.corpus.kaldi import KALDI
from voxtral_dist.shards.corpus.lhotse_shar import LHOTSE_SHAR
from voxtral_dist.shards.corpus.ljspeech import LJSPEECH
from voxtral_dist.shards.corpus.manifests import MANIFEST
from voxtral_dist.shards.corpus.nemo_tarred import NEMO_TARRED
from voxtral_dist.shards.corpus.tables import CSV, TSV
from voxtral_dist.shards.corpus.tar_utterances import WEBDATASET
from voxtral_dist.shards.corpus.yodas import YODAS

# The first one that recognizes a source reads it. Of tars and of folders, the special ones come before the general.
IMPORTERS: tuple[Importer, ...] = (
    LHOTSE_SHAR,
    NEMO_TARRED,
    YODAS,
    KALDI,
    HUGGINGFACE,
    WEBDATASET,
    AUDIO_FOLDER,
    LJSPEECH,
    FOLDER,
    CSV,
    TSV,
    MANIFEST,
)


def importer_for(source: str, corpus_format: CorpusFormat | None) -> Importer:
    """The importer of a format; of None, the first one that recognizes the source."""
    if corpus_format is not None:
        return next(importer for importer in IMPORTERS if importer.format == corpus_format)
    return next(importer for importer in IMPORTERS if importer.recognizes(source))

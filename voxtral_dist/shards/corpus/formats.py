"""The formats of corpora. The command line imports this module at its start, so it imports nothing heavy."""

from __future__ import annotations

from typing import Literal, get_args

CorpusFormat = Literal[
    "jsonl",
    "csv",
    "tsv",
    "ljspeech",
    "folder",
    "audiofolder",
    "huggingface",
    "webdataset",
    "kaldi",
    "lhotse_shar",
    "nemo_tarred",
    "yodas",
]
FORMATS: tuple[CorpusFormat, ...] = get_args(CorpusFormat)

"""The formats of corpora, in a module without imports: the command line needs their names at its start."""

from __future__ import annotations

from typing import Literal, get_args

CorpusFormat = Literal["jsonl", "csv", "tsv", "folder", "huggingface", "webdataset"]
FORMATS: tuple[CorpusFormat, ...] = get_args(CorpusFormat)

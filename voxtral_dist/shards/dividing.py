"""A corpus packed in two parts: a training set, and a development set that is held out from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from voxtral_dist.data.stored.index_files import SHARD_TABLE_FILE
from voxtral_dist.errors import UserError
from voxtral_dist.files import write_atomically
from voxtral_dist.output.masking import masked
from voxtral_dist.shards.corpus.corpus import Corpus
from voxtral_dist.shards.corpus.held_out import Division
from voxtral_dist.shards.packing import PackOptions

# It lies in the folder until both parts are complete, so that parts of two commands are never taken for one division.
DIVISION_FILE = ".division.json"


def pack_parts(
    division: Division,
    out_dir: Path,
    options: PackOptions,
    overwrite: bool,
    pack_part: Callable[[Corpus, Path], None],
) -> None:
    """Pack the parts into `train` and `dev` of a folder; a part that an interrupted call has completed stays.

    Raises:
        UserError: the folder holds another set, or a part of a division of another corpus or with other options.
    """
    state = out_dir / DIVISION_FILE
    command = masked(json.dumps([division.train.identity, options.shard_bytes, options.name, asdict(options.rules)]))
    if (out_dir / SHARD_TABLE_FILE).exists():
        raise UserError(f"The folder {out_dir} holds a shard set, and --dev writes two into it: choose another folder.")
    parts = {"train": division.train, "dev": division.dev}
    complete = [] if overwrite else [name for name in parts if (out_dir / name / SHARD_TABLE_FILE).exists()]
    if complete and not (state.is_file() and state.read_text(encoding="utf-8") == command):
        raise UserError(
            f"The folder {out_dir / complete[0]} holds a complete shard set already, of another corpus or with other "
            "options: choose another folder, or pass --overwrite."
        )
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(state, command)
    except OSError as error:
        raise UserError(f"The folder {out_dir} cannot be written: {error.strerror}.") from error
    for name, part in parts.items():
        if name not in complete:
            pack_part(part, out_dir / name)
    state.unlink()

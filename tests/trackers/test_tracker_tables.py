"""Tables of evaluated utterances: the most errors first, with the audio that the shards hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from voxtral_dist.config import dump_config
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.trackers import tables
from voxtral_dist.trackers.tables import COLUMNS, MAX_ROWS, evaluation_table

from runs import run_config


def _results(run_dir: Path, keys: list[str]) -> None:
    folder = run_dir / "evaluations" / "step-0000002"
    folder.mkdir(parents=True)
    with (folder / "dev.jsonl").open("w", encoding="utf-8") as file:
        for number, key in enumerate(keys):
            line: dict[str, Any] = {"utterance_id": number, "key": key, "reference": "a", "hypothesis": "b"}
            errors = {"word_substitutions": number, "word_deletions": 1, "word_insertions": 2}
            file.write(json.dumps(line | errors) + "\n")


def test_the_worst_utterances_have_the_audio_of_the_shards(
    shard_folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_sets = {"dev": {"shards": str(shard_folder)}}
    config = run_config(
        tmp_path / "run", tiny_model, shard_folder, num_steps=3, stage=2, evaluation={"test_sets": test_sets}
    )
    index = read_index([str(shard_folder)])
    stored = [index.parse(number, _span(index, number)) for number in range(4)]
    # The third one is another utterance by now.
    keys = [one.key if number != 2 else "gone" for number, one in enumerate(stored)]
    _results(config.run_dir, keys)
    (config.run_dir / "config.yaml").write_text(dump_config(config))
    monkeypatch.setattr(tables, "MAX_CLIPS", 3)
    table = evaluation_table(config.run_dir, 2, "dev", tmp_path / "audio")
    assert table is not None
    assert [row[COLUMNS.index("key")] for row in table.rows] == keys[::-1]
    assert [row[COLUMNS.index("word_errors")] for row in table.rows] == [6, 5, 4, 3]
    assert {number: path.read_bytes() for number, path in table.audio.items()} == {
        0: stored[3].audio,
        2: stored[1].audio,
    }
    assert evaluation_table(config.run_dir, 3, "dev", tmp_path / "audio") is None


def test_large_tables_are_cut_and_shards_that_moved_have_no_audio(tmp_path: Path) -> None:
    _results(tmp_path, [str(number) for number in range(MAX_ROWS + 5)])
    (tmp_path / "config.yaml").write_text("model: {path: m}\n")
    table = evaluation_table(tmp_path, 2, "dev", tmp_path / "audio")
    assert table is not None
    assert (len(table.rows), table.rows[0][0], table.audio) == (MAX_ROWS, str(MAX_ROWS + 4), {})


def _span(index: Any, number: int) -> bytes:
    from voxtral_dist.data.stored.storage import Storage

    contents: bytes = Storage(None).read(index.span(number))
    return contents

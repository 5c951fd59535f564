"""Files are whole or not there."""

import errno
from pathlib import Path

import pytest

from voxtral_dist.files import write_whole


def test_a_writer_that_fails_halfway_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.json"
    write_whole(path, '{"step": 4}')

    def half(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text.encode(encoding)[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, '{"step": 8}')
    assert path.read_bytes() == b'{"step": 4}'


def test_a_file_that_was_left_half_written_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    (tmp_path / ".best.json.tmp").write_text("{", encoding="utf-8")
    write_whole(path, "{}")
    assert [one.name for one in tmp_path.iterdir()] == ["best.json"]
    assert path.read_text(encoding="utf-8") == "{}"

"""Files are written atomically, or refused before."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from voxtral_dist.errors import UserError, WriteError
from voxtral_dist.files import DISK_ERRORS, refuse_unwritable, write_atomically, write_errors_named
from voxtral_dist.model.saving import save_tensors
from voxtral_dist.model.tiny import build_tiny_voxtral

from corpora import TINY_SHAPE
from modes import unusual_modes


def test_a_writer_that_fails_halfway_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.json"
    write_atomically(path, '{"step": 4}')

    def half(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text.encode(encoding)[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, '{"step": 8}')
    assert path.read_bytes() == b'{"step": 4}'
    # The next write removes what is left of it.
    monkeypatch.undo()
    write_atomically(path, '{"step": 8}')
    assert [one.name for one in tmp_path.iterdir()] == ["best.json"]
    assert path.read_bytes() == b'{"step": 8}'


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("there", "there is a folder, but a file must be written there"),
        (256 * "a", "cannot be written: File name too long"),
    ],
)
def test_what_could_not_be_written_later_is_refused_at_the_start(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "out" / "there").mkdir(parents=True)
    with pytest.raises(UserError, match=f"^`--out`: .*{sentence}"):
        refuse_unwritable("--out", tmp_path / "out", ["possible", name])
    refuse_unwritable("--out", tmp_path / "out", ["possible"])
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["there"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / (250 * "a" + ".json"), "{}")
    assert [one.name for one in tmp_path.iterdir()] == [250 * "a" + ".json"]


def test_shards_models_and_tensors_have_the_permissions_of_new_files(
    tmp_path: Path, shard_folder: Path, tiny_model: Path
) -> None:
    assert unusual_modes(shard_folder) == unusual_modes(tiny_model) == {}
    before = os.umask(0o027)
    try:
        folder = tmp_path / "group"
        folder.mkdir()
        save_tensors({"weight": torch.zeros(2)}, folder / "model.safetensors")
        write_atomically(folder / "report.html", "<html>")
        build_tiny_voxtral(folder / "tiny", TINY_SHAPE)
        assert unusual_modes(folder) == {}
        with pytest.raises(OSError, match="No such file"):
            save_tensors({"weight": torch.zeros(2)}, folder / "nowhere" / "model.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "tiny" / "model.safetensors").stat().st_mode) == 0o640


def test_a_folder_that_was_removed_is_an_error_of_writing(tmp_path: Path) -> None:
    out, base = tmp_path / "run" / "export", tmp_path / "base" / "config.json"

    def saves(path: Path) -> None:
        with write_errors_named("The exported model", out.parent, DISK_ERRORS):
            save_tensors({"weight": torch.zeros(2)}, path)

    with pytest.raises(
        WriteError, match=r"^The exported model cannot be written to .*/run: no such file or directory\."
    ):
        saves(out / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        saves(base)

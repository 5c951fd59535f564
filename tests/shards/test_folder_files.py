"""Nothing of a folder is passed over: what cannot be read is named, with what to do."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from written import write

from voxtral_dist.data.stored.checks import Cause
from voxtral_dist.errors import UserError
from voxtral_dist.shards.corpus.corpus import open_corpus
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.corpus.utterances import Line, Refusal, Utterance
from voxtral_dist.shards.packed_utterance import PackRules, pack_line


def lines_of(folder: Path) -> list[Line]:
    return list(open_corpus(str(folder), CorpusOptions()).lines())


def test_a_file_of_an_unknown_kind_is_named_with_the_command_that_converts_it(tmp_path, caplog):
    for name in ("a.wav", "b.dss", "notes.md", "README", "c.dss", "photo.JPG"):
        write(tmp_path / name, "x")
    for name in ("a", "b"):
        write(tmp_path / f"{name}.txt", "said")
    with caplog.at_level(logging.WARNING):
        first, refused = lines_of(tmp_path)
    assert isinstance(first, Utterance)
    assert isinstance(refused, Refusal)
    assert refused.cause is Cause.NO_AUDIO
    assert refused.message.endswith("only b.dss. If that is audio, convert it by `ffmpeg -i b.dss b.flac`")
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"2 files in {tmp_path} are not read")
    assert "2 .dss, such as b.dss. If that is audio, convert it by `ffmpeg -i b.dss b.flac`." in warning
    (tmp_path / "a.wav").unlink()
    with pytest.raises(
        UserError, match=r"holds no audio files.*only 2 \.dss, such as .*b\.dss\. If that is audio, conv"
    ):
        lines_of(tmp_path)


def test_linked_folders_are_read_once_and_dangling_links_are_refused_by_name(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for path in (corpus / "a.wav", elsewhere / "b.wav"):
        write(path, "x")
        write(path.with_suffix(".txt"), "said")
    (corpus / "linked").symlink_to(elsewhere)
    (corpus / "again").symlink_to(corpus)
    (corpus / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    write(corpus / "gone.txt", "said")
    lines = lines_of(corpus)
    assert [line.key for line in lines] == ["a", "gone", "linked_b"]
    gone = lines[1]
    assert isinstance(gone, Utterance)
    refusal = pack_line(gone, PackRules())
    assert isinstance(refusal, Refusal)
    assert refusal.cause is Cause.UNREADABLE
    assert "nowhere" not in refusal.key


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    # Root may list every folder.
    write(tmp_path / "locked" / "a.wav", "x")
    scan = os.scandir

    def failing(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(UserError, match="locked cannot be read: Permission denied"):
        lines_of(tmp_path)

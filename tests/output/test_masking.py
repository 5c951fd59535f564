"""Passwords and tokens are masked wherever they are printed or stored."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

from voxtral_dist.config import RunConfig, dump_config
from voxtral_dist.config.loading import load_config
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.index_files import SHARD_TABLE_FILE, write_index
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.distributed.world import alone
from voxtral_dist.errors import UserError
from voxtral_dist.output.console import printable
from voxtral_dist.output.masking import masked
from voxtral_dist.shards.corpus.corpus import open_corpus
from voxtral_dist.shards.corpus.options import CorpusOptions
from voxtral_dist.shards.packing import PackOptions, pack
from voxtral_dist.training.metrics_log import MetricsLog

from corpora import tone, write_lines

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see https://me:p%40ss@host/a?x=1 now", "see https://***@host/a?x=1 now"),
        ("s3://key:se@cret@bucket/a.tar", "s3://***@bucket/a.tar"),
        ("s3://key:s\x0bc'\u00a0ret@bucket/a.tar", "s3://***@bucket/a.tar"),
        ('["s3://bucket","me@host"]', '["s3://bucket","me@host"]'),
        ('{"url": "ftp://u@h/"}', '{"url": "ftp://***@h/"}'),
        ("https://h/a?X-Amz-Signature=0a1b&X-Amz-Expires=60", "https://h/a?X-Amz-Signature=***&X-Amz-Expires=60"),
        ("https://h/a?sv=1&sig=abc%3D#x", "https://h/a?sv=1&sig=***#x"),
        ("https://h/a?access_token=abc", "https://h/a?access_token=***"),
        ("token hf_abcdefghijKLMNOPQRST used", "token *** used"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("Authorization: Bearer abc.def-123456", "Authorization: Bearer ***"),
        ("hf://datasets/me/set@main/a.tar", "hf://datasets/me/set@main/a.tar"),
        ("s3://bucket/{a,b}/*?.tar me@host", "s3://bucket/{a,b}/*?.tar me@host"),
        ("the key is a token; sign here: hf_short sk-no", "the key is a token; sign here: hf_short sk-no"),
    ],
)
def test_secrets_are_masked_and_nothing_else(text, expected):
    assert masked(text) == expected
    assert masked(expected) == expected


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "VLLM_API_KEY"])
def test_values_of_the_environment_are_masked(monkeypatch, name):
    monkeypatch.setenv(name, SECRET)
    assert printable(f"denied: {SECRET}") == "denied: ***"
    assert str(UserError(f"denied: {SECRET}.")) == "denied: ***."


def test_ordinary_variables_are_not_masked(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "short")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "a-long-value-of-no-secret")
    assert masked("a short a-long-value-of-no-secret") == "a short a-long-value-of-no-secret"


def config_with_secret() -> RunConfig:
    tree = {
        "run_dir": "runs/a",
        "model": {"path": "models/tiny"},
        "train_data": {"shards": [f"s3://me:{SECRET}@bucket/a"], "max_examples": 2},
        "num_steps": 1,
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 0},
        "engine": {"fsdp2": {}},
        "evaluation": {"test_sets": {"x": {"shards": f"https://host/a?token={SECRET}"}}},
    }
    return RunConfig.model_validate(tree)


def test_a_stored_configuration_holds_no_secret(tmp_path):
    text = dump_config(config_with_secret())
    assert SECRET not in text
    assert "s3://***@bucket/a" in text
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(tmp_path / "config.yaml").train_data.shards == ("s3://***@bucket/a",)


@pytest.mark.parametrize("location", ["s3://***@bucket/a", "https://host/a.tar?token=***"])
def test_a_masked_location_says_where_to_put_the_password(location):
    with pytest.raises(UserError, match=r"stored without its password or token: leave these out .* AWS_PROFILE"):
        read_index([location])


def test_a_shard_table_holds_no_secret(shard_folder, tmp_path):
    folder = Path(shutil.copytree(shard_folder, tmp_path / "set"))
    index = read_index([folder])
    (one,) = index.sets
    shards = [replace(shard, location=f"https://me:{SECRET}@host/{shard.name}") for shard in one.shards]
    write_index(folder, shards, one.records, one.languages, one.layout)
    table = (folder / SHARD_TABLE_FILE).read_text()
    assert SECRET not in table
    with pytest.raises(UserError, match="stored without its password"):
        Storage().read(read_index([folder]).span(0))


def test_a_packing_stores_no_secret(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16_000)
    rows = [
        {"audio_filepath": f"nowhere://me:{SECRET}@host/a.wav", "text": "one"},
        {"audio_filepath": f"nowhere://host/a.wav?sig={SECRET}", "text": "one"},
        {"audio_filepath": "a.wav", "text": "one"},
    ]
    manifest = write_lines(tmp_path / "manifest.jsonl", rows)
    pack(open_corpus(str(manifest), CorpusOptions()), tmp_path / "out", PackOptions(skip_bad=True))
    for path in (tmp_path / "out").iterdir():
        assert SECRET.encode() not in path.read_bytes(), path


def test_metrics_hold_no_secret(tmp_path):
    with MetricsLog(tmp_path, 1, 0, alone("cpu")) as log:
        log.write("event", 0, {"event": "bad_utterance", "reason": f"https://me:{SECRET}@host/x.tar cannot be read"})
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["reason"] == "https://***@host/x.tar cannot be read"


def test_every_place_that_prints_goes_through_the_console():
    package = Path(__file__).resolve().parents[2] / "voxtral_dist"
    found = [
        path.name
        for path in package.rglob("*.py")
        if re.search(r"sys\.std(out|err)\.write|(?<![\w.])print\(", re.sub(r">>>.*|\.\.\. .*", "", path.read_text()))
    ]
    assert found == ["console.py"]

"""An engine that shares no code with transformers' model gives the transcripts of an export: mlx-voxtral, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from voxtral_dist.model.tiny import build_tiny_voxtral

from corpora import REPOSITORY, TINY_SHAPE

PYTHON = REPOSITORY / ".rivals" / "mlx" / "bin" / "python"
# The keys of published files' sections. mlx-voxtral takes no others, and wants `rope_theta`, which transformers drops.
PUBLISHED_KEYS = {
    "audio_config": {
        *("activation_dropout", "activation_function", "attention_dropout", "dropout", "hidden_size"),
        *("initializer_range", "intermediate_size", "layerdrop", "max_source_positions", "num_attention_heads"),
        *("num_hidden_layers", "num_mel_bins", "scale_embedding", "vocab_size"),
    },
    "text_config": {
        *("attention_bias", "attention_dropout", "head_dim", "hidden_act", "hidden_size", "initializer_range"),
        *("intermediate_size", "max_position_embeddings", "mlp_bias", "model_type", "num_attention_heads"),
        *("num_hidden_layers", "num_key_value_heads", "pretraining_tp", "rms_norm_eps", "rope_theta", "use_cache"),
        "vocab_size",
    },
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="its environment is missing: run `make rivals`"),
]


def as_published(folder: Path) -> None:
    """Rewrite a `config.json` in the form of the published ones."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_theta"] = config["text_config"]["rope_parameters"]["rope_theta"]
    for section, keys in PUBLISHED_KEYS.items():
        config[section] = {key: value for key, value in config[section].items() if key in keys}
    (folder / "config.json").write_text(json.dumps(config))


@contextmanager
def served_by_mlx(folder: Path) -> Iterator[str]:
    command = [str(PYTHON), str(Path(__file__).with_name("mlx_endpoint.py")), str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def test_mlx_transcribes_an_export_as_the_model_does(run, shard_folder, tmp_path) -> None:
    base = tmp_path / "base"
    # Its windows have 30 s.
    build_tiny_voxtral(base, replace(TINY_SHAPE, window_seconds=30.0))
    as_published(base)
    assert run("export", base, tmp_path / "export").code == 0
    options = ["--max-tokens-per-second", "3"]
    assert run("evaluate", base, shard_folder, "--out", tmp_path / "offline", "--no-loss", *options).code == 0
    with served_by_mlx(tmp_path / "export") as url:
        result = run("evaluate", "mlx", shard_folder, "--server", url, "--out", tmp_path / "served", *options)
    assert result.code == 0, result.err
    ours, theirs = (
        [json.loads(line)["hypothesis"] for line in (tmp_path / name / "speech.jsonl").read_text().splitlines()]
        for name in ("offline", "served")
    )
    assert len(set(ours)) > len(ours) // 2, "the model tells them apart"
    assert sum(own == other for own, other in zip(ours, theirs, strict=True)) > len(ours) // 2
    for own, other in zip(ours, theirs, strict=True):
        # mlx-voxtral ends a transcript when it has written one token eleven times in a row.
        assert own.startswith(other), (own, other)

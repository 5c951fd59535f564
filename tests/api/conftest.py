"""The folder in which examples of the API run: a model, audio files, shards and a configuration."""

from pathlib import Path

import pytest
import yaml

from voxtral_dist.model.tiny import build_tiny_voxtral

from corpora import TINY_SHAPE, pack_manifest, write_speech_manifest

NUM_UTTERANCES = 8


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    build_tiny_voxtral(folder / "models" / "tiny", TINY_SHAPE)
    manifest = write_speech_manifest(folder, NUM_UTTERANCES)
    pack_manifest(manifest, folder / "shards" / "speech", 2**20, skip_bad=False)
    (folder / "ds_configs").mkdir()
    (folder / "ds_configs" / "zero1.json").write_text('{"zero_optimization": {"stage": 1}}')
    run = {
        "run_dir": "runs/first",
        "num_steps": 2,
        "model": {"path": "models/tiny", "precision": "float32"},
        "train_data": {"shards": ["shards/speech"], "slots_per_step": 1, "max_examples": 4, "num_workers": 0},
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 0},
        "engine": {"deepspeed": "ds_configs/zero1.json"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture
def in_workspace(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workspace)
    return workspace

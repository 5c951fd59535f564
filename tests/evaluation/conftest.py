"""Utterances that a small model knows by heart, so that its hypotheses end by themselves at different lengths."""

import os
from pathlib import Path

import pytest
from filelock import FileLock

from corpora import pack_manifest, write_speech_manifest
from workloads.fitted import fit

NUM_UTTERANCES = 23


@pytest.fixture(scope="session")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of utterances of one to three windows."""
    folder = tmp_path_factory.mktemp("shards") / "heard"
    manifest = write_speech_manifest(tmp_path_factory.mktemp("speech"), NUM_UTTERANCES, max_seconds=2.8)
    pack_manifest(manifest, folder, 10**6, skip_bad=False)
    return folder


@pytest.fixture(scope="session")
def fitted_model(tiny_model: Path, heard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the first worker of pytest-xdist that needs it, for all of them: this takes half a minute."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "fitted"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            made = tmp_path_factory.mktemp("models") / "fitted"
            fit(tiny_model, heard, made, num_utterances=NUM_UTTERANCES, batch_size=NUM_UTTERANCES, num_steps=120)
            made.rename(folder)
    return folder

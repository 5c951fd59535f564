"""Utterances that a small model knows by heart, so that its hypotheses end by themselves at different lengths."""

from pathlib import Path

import pytest

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
    folder = tmp_path_factory.mktemp("models") / "fitted"
    fit(tiny_model, heard, folder, num_utterances=NUM_UTTERANCES, batch_size=NUM_UTTERANCES, num_steps=120)
    return folder

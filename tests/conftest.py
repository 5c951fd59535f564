"""Model folders and shards that many tests read; made once per session, never written to."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from voxtral_dist.data.stored.index import ShardIndex, read_index
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.tiny import build_tiny_voxtral

from corpora import NUM_UTTERANCES, REAL_WINDOW_SHAPE, SHARD_BYTES, TINY_SHAPE, pack_manifest, write_speech_manifest
from hub_server import TOKEN, HubServer, hub_server
from servers import s3_server


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Fail the test that leaves a process group behind, instead of the ones that run after it."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("the test left a process group")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Voxtral folder with windows of 1.28 s."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_voxtral(folder, TINY_SHAPE)
    return folder


@pytest.fixture(scope="session")
def real_window_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Voxtral folder with the published window of 30 s and the smallest widths."""
    folder = tmp_path_factory.mktemp("models") / "real-window"
    build_tiny_voxtral(folder, REAL_WINDOW_SHAPE)
    return folder


@pytest.fixture(scope="session")
def prompts(tiny_model: Path) -> VoxtralPrompts:
    return VoxtralPrompts.from_pretrained(str(tiny_model))


@pytest.fixture(scope="session")
def speech_manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speech_manifest(tmp_path_factory.mktemp("speech"), NUM_UTTERANCES)


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory: pytest.TempPathFactory, speech_manifest: Path) -> Path:
    """The utterances of `speech_manifest` in several shards."""
    folder = tmp_path_factory.mktemp("shards") / "speech"
    pack_manifest(speech_manifest, folder, SHARD_BYTES, skip_bad=False)
    return folder


@pytest.fixture(scope="session")
def shard_index(shard_folder: Path) -> ShardIndex:
    return read_index([shard_folder])


@pytest.fixture(scope="session")
def s3_environment() -> Iterator[dict[str, str]]:
    """The environment variables that lead to a real S3 server with the bucket `corpus`.

    One for all tests: s3fs keeps its connections by what it was called with, and not by these variables.
    """
    with s3_server() as environment:
        yield environment


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module into the working directory, under a name that no other test uses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    count = 0

    def write(source: str) -> str:
        nonlocal count
        count += 1
        name = f"own_{tmp_path.name.replace('-', '_')}_{count}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub on localhost that huggingface_hub takes for the real one; its user is logged in by `HF_TOKEN`."""
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Otherwise large files would go to another kind of storage, by a compiled client.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server

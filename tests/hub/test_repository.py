"""Pushing a folder to a hub: private unless asked otherwise, resumable, and each refusal in one sentence."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import constants

from voxtral_dist.errors import UserError
from voxtral_dist.hub.repository import Destination, HubRepository

from hub_server import READ_TOKEN, TOKEN, HubServer, Repository

NAME = "someone/voxtral-tuned"
LARGE_BYTES = 40_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(250)) * (LARGE_BYTES // 250))
    (folder / "tekken.json").write_bytes(b"{}" * 1000)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\nText.\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def uploaded(repository: Repository) -> dict[str, bytes]:
    return {path: stored for path, stored in repository.files.items() if path != ".gitattributes"}


def test_a_folder_is_pushed_to_a_new_private_repository(hub: HubServer, folder: Path) -> None:
    repository = HubRepository.opened(Destination(NAME))
    assert (repository.url, repository.is_private) == (f"{hub.url}/{NAME}", True)
    repository.check_card((folder / "README.md").read_text())
    repository.upload(folder, "hf")
    assert hub.repositories[NAME].is_private
    assert uploaded(hub.repositories[NAME]) == contents(folder)
    assert hub.tokens == {TOKEN}


def test_a_push_that_failed_in_the_middle_sends_only_what_is_missing(hub: HubServer, folder: Path) -> None:
    hub.max_put_bytes = LARGE_BYTES - 1
    with pytest.raises(UserError, match=r"is written, but the upload to .* failed: the hub answered with status 507"):
        HubRepository.opened(Destination(NAME)).upload(folder, "hf")
    assert hub.objects.keys() == {digest(folder / "tekken.json")}
    assert uploaded(hub.repositories[NAME]) == {}, "a part of a model is never visible"
    hub.max_put_bytes, hub.puts = None, []
    HubRepository.opened(Destination(NAME)).upload(folder, "hf")
    assert hub.puts == [digest(folder / "model.safetensors")]
    assert uploaded(hub.repositories[NAME]) == contents(folder)
    HubRepository.opened(Destination(NAME)).upload(folder, "hf")
    assert len(hub.puts) == hub.repositories[NAME].num_commits == 1, "a third push changes nothing"


def test_weights_of_an_older_push_go_and_other_files_stay(hub: HubServer, folder: Path) -> None:
    stale = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["consolidated.safetensors", "picture.png", "params.json"]
    hub.repositories[NAME] = Repository(True, dict.fromkeys((*stale, *others, "config.json"), b"old"))
    HubRepository.opened(Destination(NAME)).upload(folder, "hf")
    assert hub.repositories[NAME].files == contents(folder) | dict.fromkeys(others, b"old")


def test_a_public_repository_needs_consent(hub: HubServer) -> None:
    assert not HubRepository.opened(Destination(NAME, is_public=True)).is_private
    assert not hub.repositories[NAME].is_private
    with pytest.raises(UserError, match="exists and is public: add `--public`"):
        HubRepository.opened(Destination(NAME))
    hub.repositories[NAME].is_private = True
    assert HubRepository.opened(Destination(NAME, is_public=True)).is_private, "a private one stays so"


@pytest.mark.parametrize(
    ("token", "name", "sentence"),
    [
        ("hf_expired", NAME, "does not accept the access token: log in by `hf auth login`"),
        (READ_TOKEN, NAME, "cannot be created: the access token may not write there"),
        (TOKEN, "nobody/voxtral", "cannot be created: the hub has no such repository, user or organization"),
        (TOKEN, "voxtral", "must be of the form USER/NAME"),
        (TOKEN, "some one/voxtral", "must be of the form USER/NAME"),
        ("", NAME, "needs an access token"),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence_with_a_remedy(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str, name: str, sentence: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as refused:
        HubRepository.opened(Destination(name))
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not token or token not in str(refused.value)
    assert hub.repositories == {}


def test_a_token_that_may_only_read_cannot_upload(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[NAME] = Repository(is_private=True)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(UserError, match=r"upload to .* failed: the access token may not write there"):
        HubRepository.opened(Destination(NAME)).upload(folder, "hf")


def test_a_card_that_the_hub_refuses_is_named(hub: HubServer) -> None:
    repository = HubRepository.opened(Destination(NAME))
    with pytest.raises(UserError, match=r'refuses the model card: .*"license" must be one of'):
        repository.check_card("---\nlicense: mine\n---\n\nText.\n")


def test_offline_and_unreachable_hubs_are_refused(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.stop()
    with pytest.raises(UserError, match="cannot be opened: ConnectError"):
        HubRepository.opened(Destination(NAME))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set: unset it"):
        HubRepository.opened(Destination(NAME))

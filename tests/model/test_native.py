"""The context limit of a checkpoint is what its model was trained for, and not what a converter wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from voxtral_dist.errors import UserError
from voxtral_dist.model.native import native_folder
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.published import PUBLISHED_MODELS, published_config
from voxtral_dist.model.voxtral import read_voxtral_config


def with_limit(folder: Path, stated: int, params: dict[str, int] | None) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = stated
    (folder / "config.json").write_text(json.dumps(config))
    if params is not None:
        (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.parametrize(
    ("stated", "params", "expected"),
    [
        (131_072, None, 32_768),
        (131_072, {"max_position_embeddings": 65_536}, 65_536),
        (131_072, {"max_seq_len": 16_384}, 16_384),
        (4_096, {"max_position_embeddings": 65_536}, 4_096),
    ],
)
def test_the_limit_of_the_native_parameters_goes_before_that_of_the_converter(
    stated: int, params: dict[str, int] | None, expected: int, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    path = str(with_limit(tmp_path / "model", stated, params))
    assert read_voxtral_config(path).text_config.max_position_embeddings == expected
    assert VoxtralPrompts.from_pretrained(path).max_positions == expected
    assert VoxtralPrompts.from_pretrained(path, max_positions=stated).max_positions == stated


def test_a_hub_name_is_looked_up_once_unless_the_hub_could_not_be_reached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: dict[str, str] = {}
    asked: list[str] = []

    def cached_file(name: str, file: str, **_: object) -> str | None:
        asked.append(file)
        return found.get(file)

    monkeypatch.setattr("voxtral_dist.model.native.cached_file", cached_file)
    monkeypatch.setattr("voxtral_dist.model.native._hub_layouts", {})
    assert native_folder("some/voxtral") is None
    found["params.json"] = str(tmp_path / "params.json")
    for _ in range(3):
        assert native_folder("some/voxtral") == tmp_path
    assert asked == ["config.json", "params.json"] * 2
    found["config.json"] = str(tmp_path / "config.json")
    for _ in range(3):
        assert native_folder("other/voxtral") is None
    assert asked[4:] == ["config.json"]


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_published_models_have_43_minutes(name: str) -> None:
    assert published_config(name).text_config.max_position_embeddings == 32_768


def test_a_renamed_configuration_of_hugging_face_is_no_native_folder(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(tiny_model, folder)
    (folder / "config.json").rename(folder / "params.json")
    with pytest.raises(UserError, match=r"no config\.json.*no usable params\.json"):
        VoxtralPrompts.from_pretrained(str(folder))

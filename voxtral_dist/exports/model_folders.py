"""Model folders in the layouts of transformers and of Mistral, written from one stream of weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import GenerationConfig, VoxtralConfig

from voxtral_dist.errors import UserError, first_line
from voxtral_dist.exports.folders import replaced_folder, write_card
from voxtral_dist.exports.layouts import Layout
from voxtral_dist.exports.tensor_files import MAX_FILE_BYTES, TensorFiles
from voxtral_dist.model.native import (
    NATIVE_PARAMS,
    NATIVE_WEIGHTS,
    POSITIONS,
    NativeLayout,
    feature_extractor,
    native_folder,
    native_params,
)
from voxtral_dist.model.voxtral import meta_model, read_voxtral_config
from voxtral_dist.model.weights import encoder_positions

_FEATURES = "preprocessor_config.json"
# What transformers' folders hold besides weights, and training does not change.
_COMPANIONS = (
    "tekken.json",
    _FEATURES,
    "processor_config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
_DESCRIPTIONS = ("config.json", NATIVE_PARAMS)
# Published folders and transformers' class name modules differently.
_STORED_PREFIXES = {
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
    "model.audio_tower.": "audio_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


@dataclass(frozen=True)
class BaseModel:
    """The model that training started from: its files that training does not change, and its shapes.

    folder: what it holds besides weights.
    config: its configuration.
    shapes: name and shape of each parameter, in the order of transformers' class.
    positions: the encoder's, which are never trained, and which transformers keeps in float32.
    """

    folder: Path
    config: VoxtralConfig
    shapes: Mapping[str, torch.Size]
    positions: Tensor

    @classmethod
    def from_pretrained(cls, path: str) -> BaseModel:
        """Read a folder or hub name.

        Raises:
            UserError: it is not a Voxtral model.
        """
        config = read_voxtral_config(path)
        shapes = {name: parameter.shape for name, parameter in meta_model(config).named_parameters()}
        return cls(_files_of(path), config, shapes, encoder_positions(path, config))

    @property
    def audio(self) -> dict[str, Any]:
        """The section `audio` of `tekken.json`.

        Raises:
            UserError: it is missing.
        """
        path = self.folder / "tekken.json"
        try:
            section: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["audio"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} must describe the model's audio in a section `audio`, but has none that can be read "
                f"({type(error).__name__}: {first_line(error)}): download it again from the model's repository."
            ) from error
        return section

    def description(self, name: str) -> dict[str, Any] | None:
        """The contents of `config.json` or `params.json`; None if there is no such file."""
        path = self.folder / name
        if not path.is_file():
            return None
        contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return contents


class ModelFolder(Protocol):
    """A folder that is being written."""

    def add(self, name: str, value: Tensor) -> None:
        """Take the next weight, named and ordered as in transformers' class."""

    def close(self) -> None:
        """Write what is not a weight."""


class HuggingFaceFolder:
    """A folder for transformers and peft, and for what converts from it, such as llama.cpp."""

    def __init__(self, folder: Path, base: BaseModel, dtype: torch.dtype, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self._folder = folder
        self._base = base
        self._dtype = dtype
        # Read before gigabytes are written.
        self._audio = None if (base.folder / _FEATURES).is_file() else base.audio
        sizes = {_stored_name(name): shape.numel() * dtype.itemsize for name, shape in base.shapes.items()}
        sizes[_stored_name(POSITIONS)] = base.positions.nbytes
        self._files = TensorFiles(folder, "model", sizes, max_file_bytes)

    def add(self, name: str, value: Tensor) -> None:
        """See `ModelFolder`."""
        self._files.add(_stored_name(name), self._base.positions if name == POSITIONS else value.to(self._dtype))

    def close(self) -> None:
        """See `ModelFolder`."""
        self._files.close()
        for name in _COMPANIONS:
            if (self._base.folder / name).is_file():
                shutil.copyfile(self._base.folder / name, self._folder / name)
        if self._audio is not None:
            feature_extractor(self._audio).save_pretrained(self._folder)
        if not (self._folder / "generation_config.json").is_file():
            text = self._base.config.text_config
            ids = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            GenerationConfig(**ids).save_pretrained(self._folder)
        self._write_config()

    def _write_config(self) -> None:
        """Keep the base's own file, because readers of other versions rely on keys that transformers would drop.

        Shapes never change, so that only the precision can differ.
        """
        dtype = str(self._dtype).removeprefix("torch.")
        contents = self._base.description("config.json")
        if contents is None:
            self._base.config.dtype = self._dtype
            self._base.config.architectures = ["VoxtralForConditionalGeneration"]
            self._base.config.save_pretrained(self._folder)
        elif contents.get("dtype", contents.get("torch_dtype")) == dtype:
            shutil.copyfile(self._base.folder / "config.json", self._folder / "config.json")
        else:
            _write_json(_with_dtype(contents, dtype), self._folder / "config.json")


class NativeFolder:
    """A folder in Mistral's native layout, for vLLM and mistral-inference."""

    def __init__(self, folder: Path, base: BaseModel, dtype: torch.dtype, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self._folder = folder
        self._base = base
        self._dtype = dtype
        self._audio = base.audio
        self._layout = NativeLayout(base.config)
        sizes = {name: shape.numel() * dtype.itemsize for name, shape in native_shapes(base.shapes).items()}
        self._files = TensorFiles(folder, NATIVE_WEIGHTS.partition(".")[0], sizes, max_file_bytes)

    def add(self, name: str, value: Tensor) -> None:
        """See `ModelFolder`."""
        native = self._layout.name(name)
        if native is not None:
            self._files.add(native, self._layout.to_native(name, value.to(self._dtype)))

    def close(self) -> None:
        """See `ModelFolder`."""
        self._files.close()
        shutil.copyfile(self._base.folder / "tekken.json", self._folder / "tekken.json")
        dtype = str(self._dtype).removeprefix("torch.")
        params = self._base.description(NATIVE_PARAMS)
        if params is None:
            params = native_params(self._base.config, self._audio, self._dtype)
        _write_json(params | {"dtype": dtype}, self._folder / NATIVE_PARAMS)


_LAYOUTS: dict[Layout, type[HuggingFaceFolder | NativeFolder]] = {"hf": HuggingFaceFolder, "mistral": NativeFolder}


def write_model_folders(
    weights: Iterable[tuple[str, Tensor]],
    base: BaseModel,
    dtype: torch.dtype,
    folders: Mapping[Layout, Path],
    cards: Mapping[Layout, str | None] | None = None,
) -> None:
    """Write one model in several layouts. Each folder is complete or absent, and replaces one of the same name.

    Args:
        weights: all parameters on the CPU, named and ordered as in transformers' class.
        base: the model that training started from.
        dtype: precision of the stored weights.
        folders: the folder of each layout.
        cards: the model card of each layout.
    """
    with ExitStack() as stack:
        temporary = {layout: stack.enter_context(replaced_folder(out)) for layout, out in folders.items()}
        writers: list[ModelFolder] = [_LAYOUTS[layout](folder, base, dtype) for layout, folder in temporary.items()]
        for name, value in weights:
            for writer in writers:
                writer.add(name, value)
        for writer in writers:
            writer.close()
        for layout, folder in temporary.items():
            write_card(folder, None if cards is None else cards.get(layout))


def native_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Name and shape of each tensor in the native layout, given those of transformers' class."""
    named = ((NativeLayout.name(name), shape) for name, shape in shapes.items())
    return {name: shape for name, shape in named if name is not None}


def _stored_name(name: str) -> str:
    prefix = next(prefix for prefix in _STORED_PREFIXES if name.startswith(prefix))
    return _STORED_PREFIXES[prefix] + name.removeprefix(prefix)


def _with_dtype(contents: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A configuration whose precision is another, wherever it states one."""
    keys = contents.keys() & {"dtype", "torch_dtype"} or {"dtype"}
    nested = {key: _with_dtype(value, dtype) for key, value in contents.items() if _states_dtype(value)}
    return contents | nested | dict.fromkeys(keys, dtype)


def _states_dtype(value: Any) -> bool:
    return isinstance(value, dict) and bool(value.keys() & {"dtype", "torch_dtype"})


def _write_json(contents: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _files_of(path: str) -> Path:
    """The folder of a model's files: the path itself, or the hub's cache."""
    if Path(path).is_dir():
        return Path(path)
    return native_folder(path) or Path(snapshot_download(path, allow_patterns=[*_COMPANIONS, *_DESCRIPTIONS]))

"""Initial weights, one parameter at a time, so that no process needs to hold the whole model."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import VoxtralConfig, VoxtralForConditionalGeneration
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key
from transformers.models.whisper.modeling_whisper import sinusoids

from voxtral_dist.config import ModelConfig, TrainableConfig
from voxtral_dist.errors import UserError, first_line
from voxtral_dist.model import nf4
from voxtral_dist.model.native import NATIVE_INDEX, NATIVE_WEIGHTS, POSITIONS, NativeLayout, native_folder
from voxtral_dist.model.precision import refuse_without_bfloat16
from voxtral_dist.model.quantized_linear import quantized_layers
from voxtral_dist.model.trainable import is_adapter
from voxtral_dist.model.voxtral import (
    DTYPES,
    TrainedVoxtral,
    initialize_buffers,
    meta_model,
    read_voxtral_config,
    set_tensor,
    trained_meta_model,
)

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTED = ".base_layer."
_STORED_POSITIONS = POSITIONS.removeprefix("model.")
# Pieces of a file are evenly spread. Training changes every weight, so a few pieces suffice.
_FINGERPRINT_PIECES = 64
_FINGERPRINT_PIECE_BYTES = 65_536


@dataclass(frozen=True)
class _Place:
    """Where a tensor is stored, and its shape there."""

    file: Path
    key: str
    shape: tuple[int, ...]


class InitialWeights:
    """Initial values of a model's parameters, by name: from a checkpoint's safetensors files, or drawn for adapters.

    Values are read on request, and of a matrix only the requested rows.
    """

    def __init__(
        self,
        path: str,
        model: VoxtralForConditionalGeneration,
        seed: int,
        quantizes_on: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> None:
        """Locate every parameter of a model, which may be a meta model, in a folder or the hub's cache.

        Args:
            path: the folder, or the hub name.
            model: whose parameters are wanted.
            seed: of adapters.
            quantizes_on: device that quantizes matrices, one at a time.

        Raises:
            UserError: a file is missing or damaged, or a parameter of that name and shape is missing.
        """
        self._path = path
        self._seed = seed
        self._quantizes_on = quantizes_on
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        quantized = quantized_layers(model)
        self._shapes |= {name: (one.out_features, one.in_features) for name, one in quantized.items()}
        self._quantized = set(quantized)
        self._native = None if native_folder(path) is None else NativeLayout(model.config)
        self._stored = self._check(self._find(model))

    def __call__(self, name: str) -> Tensor:
        """A parameter's initial value on the CPU, in its stored precision."""
        return self.rows(name, 0, self._shapes[name][0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The rows `start` to `stop` of a parameter's initial value, along its first dimension."""
        if name in self._quantized:
            return nf4.quantized(self._stored_rows(name, start, stop).to(self._quantizes_on))
        if not is_adapter(name):
            return self._stored_rows(name, start, stop)
        return self._adapter(name)[start:stop]

    def unquantized(self, name: str) -> Tensor | None:
        """A quantized parameter's value in float32 as it is stored; None for other parameters."""
        return self._stored_rows(name, 0, self._shapes[name][0]).float() if name in self._quantized else None

    def _stored_rows(self, name: str, start: int, stop: int) -> Tensor:
        place = self._stored.get(name)
        if place is None:
            positions: Tensor = sinusoids(*self._shapes[name])
            return positions[start:stop]
        # The file is opened for these rows only: mapped pages of an open file count as memory of this process.
        with safe_open(place.file, framework="pt") as file:
            stored = file.get_slice(place.key)
            if self._native is None:
                rows: Tensor = stored[start:stop]
                return rows
            return self._native.rows_from_native(
                _plain(name), self._shapes[name][0], lambda first, last: stored[first:last], start, stop
            )

    def fill(self, model: nn.Module, device: torch.device) -> None:
        """Give all parameters of a meta model their initial values, in its precision."""
        for name, parameter in list(model.named_parameters()):
            value = self(name).to(device, parameter.dtype)
            set_tensor(model, name, nn.Parameter(value, requires_grad=parameter.requires_grad))

    def _adapter(self, name: str) -> Tensor:
        """An adapter's initial value, as in peft: A random, B zero, DoRA's magnitudes from the weight.

        A depends on (seed, name) only, so that all ranks and engines start with the same values.
        """
        if ".lora_B." in name:
            return torch.zeros(self._shapes[name])
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed((self._seed + zlib.crc32(name.encode())) % 2**63)
            drawn = torch.empty(self._shapes[name])
            torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            return drawn
        layer = name.partition(".lora_magnitude_vector.")[0]
        norms: Tensor = torch.linalg.vector_norm(self(f"{layer}.base_layer.weight").float(), dim=1)
        return norms

    def _find(self, model: VoxtralForConditionalGeneration) -> dict[str, _Place]:
        """The place of each stored tensor, by its name in this version of transformers."""
        rename = _renaming(model) if self._native is None else self._native_names().get
        found = {}
        try:
            for path in weight_files(self._path):
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118
                        name = rename(key)
                        if name is not None:
                            found[name] = _Place(path, key, tuple(file.get_slice(key).get_shape()))
        except (OSError, SafetensorError) as error:
            raise _unreadable(self._path, error) from error
        return found

    def _native_names(self) -> dict[str, str]:
        """The model's names of tensors by native ones."""
        plain = (_plain(name) for name in self._shapes if not is_adapter(name))
        named = {NativeLayout.name(name): name for name in plain}
        return {native: name for native, name in named.items() if native is not None}

    def _check(self, found: dict[str, _Place]) -> dict[str, _Place]:
        """The places of all parameters of the model but those of adapters."""
        stored = {_plain(name): place for name, place in found.items()}
        places = {}
        for name, shape in self._shapes.items():
            if is_adapter(name) or (self._native is not None and name == POSITIONS):
                continue
            place = stored.get(_plain(name))
            if place is None or place.shape != shape:
                raise UserError(
                    f"`model.path`: the weights of {self._path!r} must contain `{name}` with the shape {shape}, but "
                    f"{'do not' if place is None else f'have {place.shape}'} instead: download or export the model "
                    "again."
                )
            places[name] = place
        return places


def encoder_positions(path: str, config: VoxtralConfig) -> Tensor:
    """The encoder's positions of a checkpoint in float32, `(positions, width)`, without looking for other weights.

    Whisper's sinusoids where they are not stored, as in the native layout.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        for path_of_file in weight_files(path):
            with safe_open(path_of_file, framework="pt") as file:
                stored = [key for key in file.keys() if key.endswith(_STORED_POSITIONS)]  # noqa: SIM118
                if stored:
                    found: Tensor = file.get_tensor(stored[0])
                    return found.float()
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    computed: Tensor = sinusoids(config.audio_config.max_source_positions, config.audio_config.hidden_size)
    return computed


def fingerprint(path: str) -> str:
    """A hash that differs for checkpoints with different weights, from the sizes and some pieces of their files."""
    digest = hashlib.blake2b(digest_size=8)
    for path_of_file in weight_files(path):
        size = path_of_file.stat().st_size
        digest.update(f"{path_of_file.name} {size}".encode())
        with path_of_file.open("rb") as file:
            for piece in range(_FINGERPRINT_PIECES):
                file.seek(size * piece // _FINGERPRINT_PIECES)
                digest.update(file.read(_FINGERPRINT_PIECE_BYTES))
    return digest.hexdigest()


def load_voxtral(config: ModelConfig, trainable: TrainableConfig | None = None, seed: int = 0) -> TrainedVoxtral:
    """The initial model of a run, whole and on the CPU: for one process, without an engine.

    Raises:
        UserError: the path is not a Voxtral checkpoint, or the configuration does not fit it.

    Example:
        >>> from voxtral_dist import load_voxtral
        >>> from voxtral_dist.config import ModelConfig
        >>> model = load_voxtral(ModelConfig(path="models/tiny", precision="float32"))
        >>> model.training
        True
    """
    model = trained_meta_model(config, trainable or TrainableConfig(), DTYPES[config.precision])
    initialize_buffers(model, torch.device("cpu"))
    InitialWeights(config.path, model, seed).fill(model, torch.device("cpu"))
    return model


def load_for_inference(path: str, device: torch.device, precision: str) -> TrainedVoxtral:
    """The whole model on a device, in evaluation mode; the precision `auto` is the stored one.

    Raises:
        UserError: the path is not a Voxtral checkpoint, or the device has no bfloat16.

    Example:
        >>> import torch
        >>> from voxtral_dist import load_for_inference
        >>> model = load_for_inference("models/tiny", torch.device("cpu"), "auto")
        >>> model.training
        False
    """
    stored = str(read_voxtral_config(path).dtype).removeprefix("torch.")
    served = ModelConfig.model_validate({"path": path, "precision": stored if precision == "auto" else precision})
    refuse_without_bfloat16(served.precision, device)
    model = load_voxtral(served)
    model.to(device)
    model.eval()
    return model


def weight_files(path: str) -> list[Path]:
    """The safetensors files of a folder, or of a hub name, which are downloaded where they are not cached.

    Raises:
        FileNotFoundError: a file is missing.
    """
    is_native = native_folder(path) is not None
    whole, index = (NATIVE_WEIGHTS, NATIVE_INDEX) if is_native else (_WHOLE, _INDEX)
    patterns = [f"{whole.partition('.')[0]}*.safetensors*"]
    folder = Path(path) if Path(path).is_dir() else Path(snapshot_download(path, allow_patterns=patterns))
    names = [whole]
    if (folder / index).is_file():
        names = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing")
    return [folder / name for name in names]


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(
        f"`model.path`: the weights of {path!r} cannot be read ({type(error).__name__}: {first_line(error)})."
    )


def _plain(name: str) -> str:
    """The name of a parameter in a model without adapters."""
    return name.replace(_ADAPTED, ".")


def _renaming(model: VoxtralForConditionalGeneration) -> Callable[[str], str | None]:
    """Map older names of tensors in published checkpoints to the new ones, by transformers' own table."""
    # The table knows published classes only.
    mapping = get_model_conversion_mapping(meta_model(model.config))
    return lambda key: rename_source_key(key, mapping, [])[0]

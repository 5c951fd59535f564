"""The file `.metadata` of torch.distributed.checkpoint (DCP), read without running what it says.

DCP pickles it, and unpickling a foreign file runs whatever that file names. Here it may name only the classes that DCP
writes for tensors. Entries of bytes are refused too: DCP unpickles them without any limit when it loads them.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_MODULE, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_MODULE, name) for name in ("ChunkStorageMetadata", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    # The folder's path, whose class moved in Python 3.13.
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint of tensors")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """DCP's reader of files, whose metadata can name tensors in the files of its folder, and nothing else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See `StorageReader`.

        Raises:
            UnpicklingError: the file is damaged, or is no description of tensors.
        """
        metadata = _read(Path(self.path) / METADATA)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Size, dtype and places of each tensor that a folder holds.

    Raises:
        UnpicklingError: see `SafeReader`.
    """
    return _tensors(_read(folder / METADATA))


def damage_of_metadata(folder: Path, files: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Why a folder does not hold weights of these shapes in these files, by name and bytes; None if it does."""
    try:
        metadata = _read(folder / METADATA)
    except pickle.UnpicklingError as error:
        return f"its {METADATA} cannot be read ({error})"
    places = metadata.storage_data or {}
    for index, place in places.items():
        if place.offset + place.length > files.get(place.relative_path, 0):
            return f"{place.relative_path} does not hold all of {index.fqn}"
    stored = _tensors(metadata)
    for name, shape in shapes.items():
        if name not in stored or tuple(stored[name].size) != tuple(shape):
            return f"its {METADATA} has no {name} of the shape {tuple(shape)}"
    return None


def _tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    stored = metadata.state_dict_metadata.items()
    return {name: tensor for name, tensor in stored if isinstance(tensor, TensorStorageMetadata)}


def _read(path: Path) -> Metadata:
    """Unpickle a description of tensors, and nothing else.

    Raises:
        UnpicklingError: the file is damaged, or describes something else.
    """
    with path.open("rb") as file:
        try:
            metadata = _Unpickler(file).load()
            _refuse_others(metadata)
        except pickle.UnpicklingError:
            raise
        except OSError:
            raise
        except Exception as error:
            # Damaged bytes call any of the allowed classes with anything.
            raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
    assert isinstance(metadata, Metadata)
    return metadata


def _refuse_others(metadata: Any) -> None:
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError("it is no metadata of DCP")
    for name, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata):
            raise pickle.UnpicklingError(f"{name} is no tensor")
    for place in (metadata.storage_data or {}).values():
        if Path(place.relative_path).name != place.relative_path or getattr(place, "transform_descriptors", None):
            raise pickle.UnpicklingError(f"{place.relative_path} is no plain file of the checkpoint")

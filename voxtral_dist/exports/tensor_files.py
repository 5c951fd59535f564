"""safetensors files of a bounded size and their index, written one at a time while the tensors arrive."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from voxtral_dist.model.saving import save_tensors

# A custom of the hub: larger files are slow to load and to resume.
MAX_FILE_BYTES = 5_000_000_000


class TensorFiles:
    """Writes the tensors of a model to `STEM.safetensors`, or to several files with an index.

    Tensors must come in the order of `sizes`. At most one file of them is held in memory. The names of files are those
    that transformers and vLLM look for.
    """

    def __init__(self, folder: Path, stem: str, sizes: Mapping[str, int], max_bytes: int = MAX_FILE_BYTES) -> None:
        """Divide the tensors among files.

        Args:
            folder: an existing folder.
            stem: beginning of the files' names.
            sizes: name and bytes of each tensor.
            max_bytes: size of a file, unless a single tensor is larger.
        """
        self._folder = folder
        self._stem = stem
        self._num_bytes = sum(sizes.values())
        self._files = _divide(sizes, max_bytes)
        self._next = 0
        self._held: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Take the next tensor, on the CPU, and write its file if it is the last one there."""
        names = self._files[self._next]
        assert name == names[len(self._held)], f"{name} came for {names[len(self._held)]}"
        self._held[name] = value.contiguous()
        if len(self._held) == len(names):
            self._write(self._file_name(self._next), self._held)
            self._next += 1
            self._held = {}

    def close(self) -> None:
        """Write the index, if there are several files."""
        assert self._next == len(self._files), f"{self._files[self._next][len(self._held)]} is missing"
        if len(self._files) > 1:
            places = {name: self._file_name(number) for number, names in enumerate(self._files) for name in names}
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": places}
            path = self._folder / f"{self._stem}.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _file_name(self, number: int) -> str:
        if len(self._files) == 1:
            return f"{self._stem}.safetensors"
        return f"{self._stem}-{number + 1:05d}-of-{len(self._files):05d}.safetensors"

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        save_tensors(tensors, self._folder / name)


def _divide(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files

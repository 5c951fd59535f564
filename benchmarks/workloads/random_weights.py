"""A folder with the published shape of Voxtral-Mini-3B-2507 and random weights: real sizes without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import torch

from voxtral_dist.model.published import MINI, published_config
from voxtral_dist.model.tekken import MAX_VOCAB_SIZE
from voxtral_dist.model.voxtral import meta_model

from workloads.speech import write_model

# What transformers itself begins with.
STANDARD_DEVIATION = 0.02
# Drawn once and written again and again: drawing all weights takes a core a minute.
BLOCK_BYTES = 256 * 10**6
FILE_NAME = "model.safetensors"


def write_published_shape(folder: Path) -> Path:
    """Write tokenizer and processor with the whole vocabulary, and 9.4 GB of bfloat16 weights."""
    write_model(folder, MAX_VOCAB_SIZE)
    config = published_config(MINI)
    config.save_pretrained(folder)
    write_random_weights(folder / FILE_NAME, meta_model(config))
    return folder


def write_random_weights(path: Path, model: Any, block_bytes: int = BLOCK_BYTES) -> None:
    """Write bfloat16 weights of a model's shapes as one safetensors file.

    Vectors are ones, which keeps norms as they start. All else is normal: a random block, repeated without end. Zeros
    would be faster to write, but GPUs multiply them faster too.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    block, place = _random_block(block_bytes), 0
    with path.open("wb") as file:
        file.write(_header(shapes))
        for shape in shapes.values():
            if len(shape) == 1:
                file.write(_bytes_of(torch.ones(shape, dtype=torch.bfloat16)))
            else:
                place = _write_repeated(file, block, place, shape.numel() * torch.bfloat16.itemsize)


def _header(shapes: dict[str, torch.Size]) -> bytes:
    """The header of the format: its length, then types, shapes and places as JSON, padded to 8 bytes."""
    tensors: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + shape.numel() * torch.bfloat16.itemsize
        tensors[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _random_block(num_bytes: int) -> bytes:
    block = torch.empty(num_bytes // torch.bfloat16.itemsize, dtype=torch.bfloat16)
    return _bytes_of(block.normal_(0.0, STANDARD_DEVIATION, generator=torch.Generator().manual_seed(0)))


def _bytes_of(values: torch.Tensor) -> bytes:
    return values.view(torch.uint8).numpy().tobytes()


def _write_repeated(file: BinaryIO, block: bytes, place: int, num_bytes: int) -> int:
    """Write the next bytes of a block that repeats, and return the place in it where the next ones begin."""
    while num_bytes:
        piece = memoryview(block)[place : place + num_bytes]
        file.write(piece)
        num_bytes -= len(piece)
        place = (place + len(piece)) % len(block)
    return place

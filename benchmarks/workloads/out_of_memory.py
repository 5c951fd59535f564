"""A lack of device memory is a result, and no failure of a benchmark."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from workloads.step_meter import write_answer

OUT_OF_MEMORY = "out of memory"


@contextmanager
def answer_out_of_memory(path: Path) -> Iterator[None]:
    """Answer that device memory was too small, and end the process with all that it holds."""
    try:
        yield
    except torch.OutOfMemoryError:
        write_answer(path, {"not_run": OUT_OF_MEMORY})
        # Libraries' own ends would wait for ranks, or fail, in the state that the error has left.
        os._exit(0)

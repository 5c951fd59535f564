"""Answers of a started process to its parent: measurements, or the reason why there are none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

OUT_OF_MEMORY = "out of memory"


def write_answer(path: Path, answer: dict[str, Any]) -> None:
    """Write an answer atomically."""
    path.with_suffix(".tmp").write_text(json.dumps(answer), encoding="utf-8")
    path.with_suffix(".tmp").rename(path)


@contextmanager
def answering_failures(path: Path) -> Iterator[None]:
    """Answer with an error in place of measurements. Running out of device memory is a result and ends the process."""
    try:
        yield
    except torch.OutOfMemoryError:
        write_answer(path, {"not_run": OUT_OF_MEMORY})
        # Libraries' own ends would wait for ranks, or fail, in the state that the error has left.
        os._exit(0)
    except Exception as error:
        write_answer(path, {"not_run": f"failed: {type(error).__name__}: {error}"})
        raise

"""Tensors in files that other users may read."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one file with the permissions of the umask; safetensors would let only its owner read it.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
    # The only way to read the umask is to set it.
    mask = os.umask(0o022)
    os.umask(mask)
    path.chmod(0o666 & ~mask)

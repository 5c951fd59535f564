"""Tensors in files that other users may read."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one file with the permissions of any other new file.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        with usual_permissions(path):
            save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error), str(path)) from error


@contextmanager
def usual_permissions(path: Path) -> Iterator[None]:
    """Give the file that the block writes the permissions of any other new file; safetensors lets only its owner read.

    An empty file tells them: reading the umask would mean setting it, for all threads.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    path.chmod(mode)

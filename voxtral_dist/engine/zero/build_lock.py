"""The lock on a build of an extension, which ends with its process."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

_POLL_SECONDS = 0.1
# Locks of torch's own are empty.
_MARK = b"held by the kernel's lock on this file"


class BuildLock:
    """Stands for torch's `FileBaton`, which a killed process leaves behind, so that each later one waits for ever.

    The kernel holds a second lock on the same file, and frees it with its process; so does torch from 2.14 on
    (pytorch/pytorch#189245). For processes that know torch's lock only, this is one of them.
    """

    def __init__(self, path: str, *_: object) -> None:
        """A lock on a file that need not exist; torch's other arguments are ignored."""
        self._path = Path(path)
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        """Whether this process must build, which it then does alone; false if another one has done so meanwhile."""
        if self._create():
            return True
        while self._path.exists():
            if self.take_over():
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def wait(self) -> None:
        """Do nothing: `try_acquire` has waited."""

    def release(self) -> None:
        """Let others build."""
        self._path.unlink(missing_ok=True)
        self.let_go()

    def take_over(self) -> bool:
        """Hold the lock of a process that was killed; whether that is possible."""
        try:
            descriptor = os.open(self._path, os.O_RDWR)
        except OSError:
            return False
        if os.read(descriptor, len(_MARK)) == _MARK and _holds(descriptor) and self._is_here(descriptor):
            self._descriptor = descriptor
            return True
        os.close(descriptor)
        return False

    def let_go(self) -> None:
        """Hold it no more, and leave the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _create(self) -> bool:
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        # Without it, on a file system that has none, this is torch's lock.
        if _holds(self._descriptor):
            os.write(self._descriptor, _MARK)
        return True

    def _is_here(self, descriptor: int) -> bool:
        """Whether an open file still has its name, which is taken from it when the lock is released."""
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False


def _holds(descriptor: int) -> bool:
    """Whether this process has got the kernel's lock on an open file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

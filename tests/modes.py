"""Permissions of what the package writes."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def unusual_modes(folder: Path) -> dict[str, str]:
    """Files and folders below a folder that have other permissions than the umask gives to new ones, in octal."""
    # The only way to read the umask is to set it.
    mask = os.umask(0o022)
    os.umask(mask)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    usual = {True: 0o777 & ~mask, False: 0o666 & ~mask}
    return {str(path.relative_to(folder)): f"{mode:o}" for path, mode in modes.items() if mode != usual[path.is_dir()]}

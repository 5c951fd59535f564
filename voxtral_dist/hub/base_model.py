"""The name on the hub of the model that training started from."""

from __future__ import annotations

from pathlib import Path

from voxtral_dist.config import is_hub_name

# Folder of a repository in the hub's cache: `models--USER--NAME`.
_CACHED = "models--"


def hub_name(path: str) -> str | None:
    """The name of a model on the hub, given its name there or its folder in the hub's cache; None for other folders."""
    if not Path(path).is_dir():
        return path if is_hub_name(path) else None
    cached = next((part for part in Path(path).resolve().parts if part.startswith(_CACHED)), "")
    name = cached.removeprefix(_CACHED).replace("--", "/", 1)
    return name if is_hub_name(name) else None

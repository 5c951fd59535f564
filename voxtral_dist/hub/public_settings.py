"""The configuration of a run without what tells about the machine that it ran on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from voxtral_dist.config import RunConfig

_SECTIONS = (
    "num_steps",
    "num_epochs",
    "seed",
    "model",
    "trainable",
    "train_data",
    "optimizer",
    "engine",
    "evaluation",
)
# Locations of models and of shards, which may be names of folders, URLs or names on the hub.
_LOCATIONS = frozenset({"path", "shards"})


def public_settings(config: RunConfig) -> dict[str, Any]:
    """What determines the result of a run, as plain values.

    Left out are the sections that do not, locations of models and shards, and all values that could be a path or a
    URL, such as arguments of an augmentation.
    """
    tree = config.model_dump(include=set(_SECTIONS))
    return {name: _public(tree[name]) for name in _SECTIONS}


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: one for key, one in value.items() if key not in _LOCATIONS and not _is_location(one)}
        return {str(key): _public(one) for key, one in kept.items()}
    if isinstance(value, list | tuple | set):
        return [_public(one) for one in value if not _is_location(one)]
    return str(value) if isinstance(value, str) else value


def _is_location(value: Any) -> bool:
    return isinstance(value, Path) or (
        isinstance(value, str) and ("/" in value or "\\" in value or value.startswith("~"))
    )

"""Refusal of ranks that would train something else than rank 0, before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.collectives import from_first_rank, gather_on_first
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError
from voxtral_dist.model.published import stored_folder
from voxtral_dist.model.weights import fingerprint
from voxtral_dist.output.counting import counted
from voxtral_dist.scoring.normalizer import normalizer
from voxtral_dist.training.versions import package_versions

# Folders of a host: `run_dir` is checked by a file in it, and of DeepSpeed's file the contents are compared.
_MAY_DIFFER = {"run_dir", "engine.deepspeed", "engine.nvme_dir", "storage.cache_dir"}
_NVME_PATH = "nvme_path"
# Besides weights, what decides a model's inputs and shape.
_MODEL_FILES = ("config.json", "params.json", "tekken.json", "preprocessor_config.json")
_ABSENT = "(absent)"
_MOST_SHOWN, _MOST_CHARACTERS = 4, 120


@dataclass(frozen=True)
class Difference:
    """A value that is another one on `rank` than on rank 0."""

    rank: int
    host: str
    key: str
    here: str
    on_first: str


def refuse_different_runs(config: RunConfig, allow_changed: Sequence[str], world: World) -> None:
    """Refuse ranks that would train something else than rank 0, which would go unnoticed or hang later.

    Compared are the configuration (but for folders that may differ by host), DeepSpeed's file, the model's files where
    they are on this machine already, the code of this package, and versions of packages. All ranks call it together.

    Raises:
        UserError: a rank differs, on all ranks; or DeepSpeed's file cannot be read.
    """
    found = find_differences(config, allow_changed, world)
    if found:
        raise UserError(_sentence(found, from_first_rank(socket.gethostname(), world), world.size))


def find_differences(config: RunConfig, allow_changed: Sequence[str], world: World) -> list[Difference]:
    """What is compared by `refuse_different_runs` and differs from rank 0's, on all ranks.

    Raises:
        UserError: DeepSpeed's file cannot be read.
    """
    if world.size == 1:
        return []
    own = dict(_facts(config, allow_changed))
    # Only differences are gathered, so that rank 0 need not hold the settings of a thousand ranks.
    differences = gather_on_first(_differences(own, from_first_rank(own, world), world.rank), world)
    return from_first_rank([one for of_rank in differences for one in of_rank], world)


def _facts(config: RunConfig, allow_changed: Sequence[str]) -> Iterator[tuple[str, str]]:
    for key, value in _flat(config.model_dump(mode="json")):
        if key not in _MAY_DIFFER:
            yield f"`{key}`", repr(value)
    yield "`--allow-changed`", repr(sorted(allow_changed))
    if config.engine.deepspeed is not None:
        from voxtral_dist.engine.zero.settings import read_deepspeed_file

        for key, value in _flat(read_deepspeed_file(config.engine.deepspeed)):
            if not key.endswith(_NVME_PATH):
                yield f"`{key}` in DeepSpeed's file", repr(value)
    model = _model_fingerprint(config.model.path)
    if model is not None:
        yield "the fingerprint of the files of `model.path`", model
    yield "the normalizer behind `train_data.target_text`, with versions of your functions,", _normalizer_label(config)
    for package, version in package_versions().items():
        yield f"the version of {package}", version
    yield "the version of Python", platform.python_version()
    yield "the fingerprint of voxtral-dist's source files", _source_fingerprint()


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a tree of mappings and lists, by dotted keys."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not value or not isinstance(value, dict | list):
        yield key, value
    for name, child in children:
        yield from _flat(child, f"{key}.{name}" if key else str(name))


def _model_fingerprint(path: str) -> str | None:
    """A hash of a model's files, from pieces of the large ones; None if they are not on this machine, or not whole."""
    folders = (stored_folder(path, name) for name in ("config.json", "params.json"))
    folder = next((found for found in folders if found is not None), None)
    if folder is None:
        return None
    try:
        digest = hashlib.blake2b(fingerprint(folder).encode(), digest_size=8)
        for file in (Path(folder) / name for name in _MODEL_FILES):
            if file.is_file():
                digest.update(f"{file.name} ".encode() + hashlib.blake2b(file.read_bytes()).digest())
    except (OSError, json.JSONDecodeError, KeyError):
        # What loads the model next says what is wrong.
        return None
    return digest.hexdigest()


def _normalizer_label(config: RunConfig) -> str:
    try:
        return normalizer(config.evaluation.normalizer, config.train_data.target_text).label
    except UserError as error:
        # What is missing on all ranks is refused when it is used.
        return str(error)


def _source_fingerprint() -> str:
    """A hash of this package's modules: an edited checkout has the version of the one it was made from."""
    folder = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)} ".encode() + file.read_bytes())
    return digest.hexdigest()


def _differences(own: Mapping[str, str], first: Mapping[str, str], rank: int) -> list[Difference]:
    host = socket.gethostname()
    keys = [*first, *(key for key in own if key not in first)]
    pairs = ((key, own.get(key, _ABSENT), first.get(key, _ABSENT)) for key in keys)
    found = [Difference(rank, host, key, _short(here), _short(there)) for key, here, there in pairs if here != there]
    # A model may be in the cache of some hosts only; what was not read is not known to differ.
    return [one for one in found if not ("`model.path`" in one.key and _ABSENT in (one.here, one.on_first))]


def _short(value: str) -> str:
    return value if len(value) <= _MOST_CHARACTERS else f"{value[:_MOST_CHARACTERS]}..."


def _sentence(found: Sequence[Difference], first_host: str, size: int) -> str:
    groups: dict[tuple[str, str, str], list[Difference]] = {}
    for one in found:
        groups.setdefault((one.key, one.here, one.on_first), []).append(one)
    parts = []
    for (key, here, on_first), others in list(groups.items())[:_MOST_SHOWN]:
        ranks = [one.rank for one in others]
        hosts = sorted({one.host for one in others})
        parts.append(
            f"{key} is {on_first} on rank 0 ({first_host}), but {here} on the ranks {ranks[:8]} ({len(ranks)} of "
            f"{size}; {', '.join(hosts[:8])})"
        )
    if len(groups) > _MOST_SHOWN:
        parts.append(f"and {counted(len(groups) - _MOST_SHOWN, 'more difference')}")
    return (
        f"All ranks must start the same run, but {'; '.join(parts)}. Start the same command with the same files and "
        "packages on every host."
    )

"""What a resumed run has changed since its checkpoint: shown, and refused where results could no longer be compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from voxtral_dist.checkpoints.complete import read_complete
from voxtral_dist.config import RunConfig
from voxtral_dist.config.loading import read_yaml
from voxtral_dist.errors import UserError

_ABSENT = "(absent)"
_SETS = "evaluation.test_sets."
# Losses or error rates before and after such a change measure different things.
_INCOMPARABLE = {
    "model.precision",
    "evaluation.normalizer",
    "evaluation.num_beams",
    "evaluation.max_tokens_per_second",
    "evaluation.ema",
}
# A folder may move.
_PLACES = {"run_dir", "model.path"}


@dataclass(frozen=True)
class Change:
    """A setting with another value than in the configuration of the checkpoint.

    breaks: whether results before and after it cannot be compared.
    """

    key: str
    before: Any
    now: Any
    breaks: bool

    def __str__(self) -> str:
        return f"`{self.key}`: {self.before} -> {self.now}"


def changes_since(folder: Path, config: RunConfig, test_sets: Mapping[str, str]) -> list[Change]:
    """The settings that differ from those of a complete checkpoint's run.

    Args:
        folder: the checkpoint.
        config: the configuration now.
        test_sets: fingerprint of each test set now.
    """
    before, now = _stored(folder), dict(_flat(config.model_dump(mode="json")))
    known = read_complete(folder).test_sets
    common = {key.split(".")[2] for key in before if key.startswith(_SETS)} & config.evaluation.test_sets.keys()
    changes = [
        Change(key, before.get(key, _ABSENT), now.get(key, _ABSENT), _breaks(key, common, known))
        for key in [*before, *(key for key in now if key not in before)]
        if key not in _PLACES and before.get(key, _ABSENT) != now.get(key, _ABSENT)
    ]
    changed = (name for name, found in test_sets.items() if known.get(name, found) != found)
    return changes + [Change(f"{_SETS}{name}", "its utterances", "others", breaks=True) for name in changed]


def refuse_incomparable(folder: Path, changes: Sequence[Change], allowed: Sequence[str]) -> None:
    """Refuse changes after which results of the run could not be compared with those before.

    Args:
        folder: the checkpoint.
        changes: of `changes_since`.
        allowed: keys whose changes are wanted, or sections of such keys.

    Raises:
        UserError: another key has changed so.
    """
    refused = [change for change in changes if change.breaks and not _is_in(change.key, allowed)]
    if refused:
        options = " ".join(f"--allow-changed {change.key}" for change in refused)
        raise UserError(
            f"The run was configured otherwise when it wrote {folder}, so its results before and after could not be "
            f"compared: {', '.join(map(str, refused))}. Restore that, choose another `run_dir`, or add {options}."
        )


def refuse_unknown_keys(allowed: Sequence[str], config: RunConfig) -> None:
    """Refuse keys of `--allow-changed` that no configuration has.

    Raises:
        UserError: a key is unknown.
    """
    known = [*(key for key, _ in _flat(config.model_dump(mode="json"))), *_INCOMPARABLE]
    for key in allowed:
        if not key.startswith(_SETS) and not any(_is_in(one, [key]) for one in known):
            raise UserError(f"`--allow-changed {key}`: the configuration has no such key.")


def _breaks(key: str, common_sets: set[str], known_sets: Mapping[str, str]) -> bool:
    if not key.startswith(_SETS):
        return key in _INCOMPARABLE
    name, _, setting = key.removeprefix(_SETS).partition(".")
    # A moved test set is recognized by its fingerprint, where the checkpoint has it.
    return name in common_sets and not (setting == "shards" and name in known_sets)


def _stored(folder: Path) -> dict[str, Any]:
    """The configuration of a checkpoint, with defaults for settings that its version did not have."""
    tree = read_yaml(folder / "config.yaml")
    # A version with other keys: what it says counts.
    with suppress(ValidationError):
        tree = RunConfig.model_validate(tree).model_dump(mode="json")
    return dict(_flat(tree))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_in(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)

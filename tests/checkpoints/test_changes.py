"""What a resumed run has changed is listed, and refused where results could not be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from voxtral_dist.checkpoints.changes import changes_since, refuse_incomparable, refuse_unknown_keys
from voxtral_dist.checkpoints.directory import CheckpointDirectory, checkpoint_folder
from voxtral_dist.checkpoints.progress import TrainProgress
from voxtral_dist.config import RunConfig
from voxtral_dist.distributed.world import alone
from voxtral_dist.errors import UserError
from voxtral_dist.train import changes_of

from runs import run_config
from states import WholeStates

SETS = {"dev": {"shards": "shards/dev"}, "test": {"shards": "shards/test", "max_utterances": 10}}
FINGERPRINTS = {"dev": "a", "test": "b"}


@pytest.fixture(scope="module")
def config(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with a checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("changes")
    config = run_config(folder, tiny_model, shard_folder, num_steps=9, evaluation={"test_sets": SETS})
    world = alone("cpu")
    directory = CheckpointDirectory(config, "", world, FINGERPRINTS)
    directory.save(WholeStates(world), TrainProgress(step=3))  # type: ignore[arg-type]
    return config


def with_changes(config: RunConfig, **changes: Any) -> RunConfig:
    """The configuration with other values of dotted keys, written with two underscores."""
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        *sections, leaf = key.split("__")
        part = tree
        for section in sections:
            part = part[section]
        part[leaf] = value
    return RunConfig.model_validate(tree)


def found(config: RunConfig, test_sets: dict[str, str] = FINGERPRINTS) -> dict[str, bool]:
    folder = checkpoint_folder(config.run_dir, 3)
    return {str(change): change.breaks for change in changes_since(folder, config, test_sets)}


def test_the_same_configuration_has_no_changes(config: RunConfig) -> None:
    assert found(config) == {}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"optimizer__learning_rate": 0.5}, "`optimizer.learning_rate`: 0.002 -> 0.5"),
        ({"optimizer__betas": [0.5, 0.6]}, "`optimizer.betas`: [0.9, 0.98] -> [0.5, 0.6]"),
        ({"num_steps": 12}, "`num_steps`: 9 -> 12"),
        ({"evaluation__test_sets__dev__shards": "moved"}, "`evaluation.test_sets.dev.shards`: shards/dev -> moved"),
        ({"evaluation__test_sets__new": {"shards": "s"}}, "`evaluation.test_sets.new.shards`: (absent) -> s"),
    ],
)
def test_a_change_is_listed(config: RunConfig, changes: dict[str, Any], line: str) -> None:
    listed = found(with_changes(config, **changes))
    assert listed[line] is False
    assert not any(listed.values())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model__precision": "bfloat16"}, "model.precision"),
        ({"evaluation__normalizer": "none"}, "evaluation.normalizer"),
        ({"evaluation__num_beams": 4}, "evaluation.num_beams"),
        ({"evaluation__test_sets__test__max_utterances": None}, "evaluation.test_sets.test.max_utterances"),
        ({"evaluation__test_sets__test__detect_language": True}, "evaluation.test_sets.test.detect_language"),
    ],
)
def test_a_change_that_breaks_comparisons_is_refused_unless_it_is_allowed(
    config: RunConfig, changes: dict[str, Any], key: str
) -> None:
    changed = with_changes(config, **changes)
    with pytest.raises(UserError, match=f"add --allow-changed {key}"):
        changes_of(changed, 3, 9, FINGERPRINTS, [])
    assert [change.key for change in changes_of(changed, 3, 9, FINGERPRINTS, [key])] == [key]
    assert len(changes_of(changed, 3, 9, FINGERPRINTS, [key.rpartition(".")[0]])) == 1


def test_other_utterances_under_the_same_name_are_refused(config: RunConfig) -> None:
    folder = checkpoint_folder(config.run_dir, 3)
    changes = changes_since(folder, config, FINGERPRINTS | {"dev": "other"})
    assert [str(change) for change in changes] == ["`evaluation.test_sets.dev`: its utterances -> others"]
    with pytest.raises(UserError, match=r"--allow-changed evaluation\.test_sets\.dev"):
        refuse_incomparable(folder, changes, [])
    refuse_incomparable(folder, changes, ["evaluation.test_sets.dev"])


def test_a_configuration_of_another_version_is_compared_by_the_keys_that_it_has(config: RunConfig) -> None:
    path = checkpoint_folder(config.run_dir, 3) / "config.yaml"
    before = path.read_text()
    try:
        path.write_text(yaml.safe_dump(yaml.safe_load(before) | {"removed": 1}))
        assert found(config) == {"`removed`: 1 -> (absent)": False}
    finally:
        path.write_text(before)


def test_a_run_past_its_last_step_says_so(config: RunConfig) -> None:
    with pytest.raises(UserError, match=r"ends at step 2 .* newest checkpoint is of step 3: set at least 3 steps"):
        changes_of(config, 3, 2, FINGERPRINTS, [])


def test_a_misspelt_key_is_refused(config: RunConfig) -> None:
    refuse_unknown_keys(["evaluation", "model.precision", "evaluation.test_sets.dev"], config)
    with pytest.raises(UserError, match=r"`--allow-changed model\.precison`: the configuration has no such key"):
        refuse_unknown_keys(["model.precison"], config)

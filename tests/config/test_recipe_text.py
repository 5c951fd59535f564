"""Recipes are edited as text: values change, comments and order stay."""

from __future__ import annotations

import pytest
import yaml

from voxtral_dist.config import edited_recipe, recipes


def with_value(tree, dotted, value):
    *parents, leaf = dotted.split(".")
    inner = tree
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[leaf] = value
    return tree


@pytest.mark.parametrize("name", sorted(recipes()))
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run_dir", "runs/a b"),
        ("train_data.shards", ["shards/one", "shards/two"]),
        ("train_data.max_windows", 3),
        ("evaluation.test_sets", {"dev": {"shards": "x", "max_utterances": 5}}),
        ("evaluation.selection", {"test_set": "dev", "metric": "cer"}),
        ("storage.cache_dir", "/cache"),
        ("model.activation_checkpointing.encoder", 2),
    ],
)
def test_a_value_changes_and_nothing_else(name, key, value):
    text = recipes()[name].read_text(encoding="utf-8")
    before = yaml.safe_load(text)
    if key == "model.activation_checkpointing.encoder":
        # A mapping on one line is replaced as a whole.
        key, value = "model.activation_checkpointing", {"encoder": 2}
    edited = edited_recipe(text, {key: value}, "A heading.")
    assert yaml.safe_load(edited) == with_value(before, key, value)
    assert list(yaml.safe_load(edited)) == list(before)
    lines = text.splitlines()
    comments = [line.partition("#")[2] for line in lines if "#" in line and not line.startswith("#")]
    kept = [line.partition("#")[2] for line in edited.splitlines() if "#" in line and not line.startswith("#")]
    assert len(comments) - len(kept) in ((0,) if key != "evaluation.test_sets" else (0, 1))
    assert set(kept) <= set(comments)


def test_the_heading_replaces_the_first_comment():
    text = recipes()["digits"].read_text(encoding="utf-8")
    edited = edited_recipe(text, {}, "One line.\n\n  voxtral-dist plan")
    assert edited.startswith("# One line.\n#\n#   voxtral-dist plan\nrun_dir: runs/digits\n")
    assert edited_recipe(edited, {}, "One line.\n\n  voxtral-dist plan") == edited

"""`voxtral-dist plan` without a configuration lists the recipes that fit a GPU."""

from __future__ import annotations

import json

import pytest

from voxtral_dist.config import recipes
from voxtral_dist.estimate import fitting


def test_the_recipes_of_a_card_are_listed(run, monkeypatch, terminal):
    monkeypatch.setattr(fitting, "recipes", lambda: {"voxtral_mini_qlora": recipes()["voxtral_mini_qlora"]})
    listed = run("plan", "--gpu-memory", "12GB", "--json")
    (found,) = json.loads(listed.out)
    assert found["recipe"] == "voxtral_mini_qlora"
    assert (found["trains"], found["max_windows"], found["overrides"]) == ("LoRA beside 4 bits", 4, [])
    assert found["memory"]["fits"]
    assert "plan: recipe 0/1" in terminal.getvalue()
    assert f"{found['memory']['device_bytes'] / 1e9:.1f} GB" in run("plan", "--gpu-memory", "12GB").out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "No configuration was given"),
        (["--gpu-memory", "24GB", "--set", "num_steps=1"], "`--set` needs `--config`"),
        (["--gpu", "V100"], "'V100' instead. It has no bfloat16, in which the recipes compute: see docs/gpus.md. For"),
        (["--gpu", "GTX 970"], "'GTX 970' instead. For another GPU, give --gpu-memory"),
    ],
)
def test_what_cannot_be_listed_is_refused(run, options, message):
    refused = run("plan", *options)
    assert refused.code == 2
    assert message in refused.err

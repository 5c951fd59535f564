"""`voxtral-dist recipes` lists the configurations of the package, and prints one."""

from __future__ import annotations

from voxtral_dist.config import recipes, summary


def test_the_list_says_what_each_recipe_is_for(run):
    listed = run("recipes")
    assert listed.code == 0
    for name, path in recipes().items():
        line = next(line for line in listed.out.splitlines() if line.startswith(f"{name} "))
        assert line.endswith(summary(path))
        assert len(summary(path).split()) > 5
    assert run("recipes", "digits").out == recipes()["digits"].read_text()
    refused = run("recipes", "digit")
    assert refused.code == 2
    assert "the names are an4, " in refused.err

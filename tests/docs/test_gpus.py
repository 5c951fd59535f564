"""Estimates in docs/gpus.md are those of `voxtral-dist plan`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from voxtral_dist.config import load_config
from voxtral_dist.estimate.estimate import estimate_run
from voxtral_dist.estimate.estimator import Machine, ShardingRow
from voxtral_dist.estimate.sharding import configured_sharding
from voxtral_dist.model.published import published_config
from voxtral_dist.model.voxtral import meta_model

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
PAGE = (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Row:
    """A row of the table for one recipe; card: GB of the smallest; host: GB of a node, 0 where any amount will do."""

    num_gpus: int
    card: int
    host: int
    recipe: str
    overrides: list[str]
    estimated: int


def rows() -> Iterator[Row]:
    """Yield the rows with an estimate."""
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and (estimated := re.fullmatch(r"(\d+) GB", cells[5])):
            num_gpus, card = re.match(r"(?:(\d+) x )?(\d+) GB", cells[0]).groups()
            host = re.match(r"(\d+) GB", cells[1])
            assert host or cells[1] == "any"
            overrides = re.findall(r"--set (\S+=[^`]+)", cells[4])
            for recipe in re.findall(r"`(\w+\.yaml)`", cells[3]):
                yield Row(
                    int(num_gpus or 1), int(card), int(host[1]) if host else 0, recipe, overrides, int(estimated[1])
                )


ROWS = list(rows())


def test_rows_are_found():
    assert len(ROWS) == 15
    # Each recipe of a published model fits a machine as it is. Those of public corpora are on a page of their own.
    published = {path.name for path in RECIPES if path.name.startswith("voxtral_")}
    assert {row.recipe for row in ROWS if not row.overrides} == published


def estimate_of(recipe: str, overrides: list[str], num_gpus: int, card: int) -> ShardingRow:
    config = load_config(ROOT / "launch" / "recipes" / recipe, overrides)
    return estimate_run(config, Machine(num_gpus=num_gpus, gpu_memory=card * 10**9)).memory.configured


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.num_gpus}x{row.card}-{row.recipe}")
def test_a_machine_needs_what_the_table_says(row, monkeypatch):
    monkeypatch.chdir(ROOT)
    needed = estimate_of(row.recipe, row.overrides, row.num_gpus, row.card)
    assert needed.device_bytes / 1e9 == pytest.approx(row.estimated, abs=1)
    assert needed.device_bytes / 1e9 < 0.9 * row.card
    assert needed.host_bytes_of_node / 1e9 <= row.host


@pytest.mark.parametrize("recipe", sorted({row.recipe for row in ROWS}))
def test_a_recipe_says_which_machine_it_is_for(recipe):
    comment = re.match(r"(#.*\n)+", (ROOT / "launch" / "recipes" / recipe).read_text(encoding="utf-8"))[0]
    row = min((row for row in ROWS if row.recipe == recipe and not row.overrides), key=lambda row: row.card)
    assert re.search(rf"GPUs? of {row.card} GB", comment.replace("\n# ", " "))
    if "offload" in recipe:
        assert "GB of host memory" in comment.replace("\n# ", " ")


@pytest.mark.parametrize("recipe", ["voxtral_mini_full.yaml", "voxtral_mini_offload.yaml", "voxtral_small_24b.yaml"])
def test_zero3_fetches_one_whole_block_ahead(recipe, monkeypatch):
    """A prefetch ends with the weight with which it reaches the limit."""
    monkeypatch.chdir(ROOT)
    config = load_config(ROOT / "launch" / "recipes" / recipe)
    sharding = configured_sharding(config.engine, 8)
    block = meta_model(published_config(config.model.path)).model.language_model.layers[0]
    sizes = [one.numel() for one in block.parameters() if one.numel() > sharding.persistent_size]
    assert sum(sizes[:-1]) < sharding.prefetch_bucket <= sum(sizes)


@pytest.mark.parametrize(("name", "recipe"), [("FSDP2", "voxtral_mini_fsdp2"), ("ZeRO-3", "voxtral_mini_full")])
def test_one_card_without_offloading_is_too_small_as_the_page_says(name, recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    said = int(re.search(rf"(\d+) GB \({name}\)", PAGE)[1])
    recomputed = ["model.activation_checkpointing={encoder: 1, language_model: 1}"]
    assert estimate_of(f"{recipe}.yaml", recomputed, 1, 80).device_bytes / 1e9 == pytest.approx(said, abs=1)

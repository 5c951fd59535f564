"""Estimates in docs/gpus.md are those of `voxtral-dist plan`."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from voxtral_dist.config import load_config
from voxtral_dist.estimate.estimate import estimate_run
from voxtral_dist.estimate.estimator import Machine

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8")


def rows() -> Iterator[tuple[int, int, str, list[str], int]]:
    """Yield number of GPUs, GB of the smallest card, recipe, overrides and estimated GB of rows with an estimate."""
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and (estimated := re.fullmatch(r"(\d+) GB", cells[5])):
            num_gpus, card = re.match(r"(?:(\d+) x )?(\d+) GB", cells[0]).groups()
            overrides = re.findall(r"--set (\S+=[^`]+)", cells[4])
            for recipe in re.findall(r"`(\w+\.yaml)`", cells[3]):
                yield int(num_gpus or 1), int(card), recipe, overrides, int(estimated[1])


ROWS = list(rows())


def test_rows_are_found():
    assert len(ROWS) == 8


def gigabytes_of(recipe: str, overrides: list[str], num_gpus: int, card: int) -> float:
    config = load_config(ROOT / "launch" / "recipes" / recipe, overrides)
    machine = Machine(num_gpus=num_gpus, gpus_per_node=num_gpus, gpu_memory=card * 10**9)
    return estimate_run(config, machine).configured.device_bytes / 1e9


@pytest.mark.parametrize(("num_gpus", "card", "recipe", "overrides", "estimated"), ROWS)
def test_a_card_needs_what_the_table_says(num_gpus, card, recipe, overrides, estimated, monkeypatch):
    monkeypatch.chdir(ROOT)
    needed = gigabytes_of(recipe, overrides, num_gpus, card)
    assert needed == pytest.approx(estimated, abs=1)
    assert needed < card


@pytest.mark.parametrize(("name", "recipe"), [("FSDP2", "voxtral_mini_fsdp2"), ("ZeRO-3", "voxtral_mini_full")])
def test_one_card_without_offloading_is_too_small_as_the_page_says(name, recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    said = int(re.search(rf"(\d+) GB \({name}\)", PAGE)[1])
    assert gigabytes_of(f"{recipe}.yaml", [], 1, 80) == pytest.approx(said, abs=1)

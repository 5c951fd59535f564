"""The commands of docs/public_speech.md pack look-alikes of the corpora, and its figures are those of `plan`."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import constants
from written import RATE, hertz

from voxtral_dist.config import RunConfig, load_config
from voxtral_dist.data.examples.shard_dataset import ShardDataset
from voxtral_dist.data.training_set import build_training_set
from voxtral_dist.estimate.estimator import Estimator, Machine
from voxtral_dist.estimate.gpus import GPUS
from voxtral_dist.estimate.sharding import configured_sharding
from voxtral_dist.estimate.times import configured_step_time
from voxtral_dist.estimate.workload import find_workload
from voxtral_dist.output.duration import duration

from commands import Result, run_command
from hub_server import HubServer
from public_corpora import HUB, SIZES, write_common_voice, write_openslr

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "public_speech.md").read_text(encoding="utf-8")
PACK = "voxtral-dist shards pack "
CORPUS = "cv-corpus-24.0-2025-12-05/de"
MAKE = {
    "multimed": "multimed_german",
    "librispeech": "librispeech_100h",
    "fleurs": "fleurs_german",
    "voxpopuli": "voxpopuli_german",
    "commonvoice": "common_voice_german",
}
# What comes before the number of an utterance in its text, and the language.
TEXTS = {
    "multimed_german": ("German Text, Nummer {}", "de"),
    "librispeech_100h": ("CHAPTER ONE {}", "en"),
    "fleurs_german": ("Ein Satz: {}", "de"),
    "voxpopuli_german": ("Herr Präsident! {}", "de"),
    "common_voice_german": ('Er sagte "{0}", und zwar {0}', "de"),
}


def blocks() -> Iterator[list[str]]:
    """The commands of each block that packs."""
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        if PACK in block:
            yield block.splitlines()


def commands_of(recipe: str) -> list[str]:
    """The commands that pack for a recipe."""
    (block,) = (block for block in blocks() if block[-1] == f"voxtral-dist train --config {recipe}")
    assert all(line.startswith(PACK) for line in block[:-1])
    return block[:-1]


@pytest.fixture
def public(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working directory, and a hub with the look-alikes."""
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[[str], Result]:
    return lambda command: run_command(capsys, *shlex.split(command)[1:])


def heard(row: dict[str, object]) -> int:
    """The number of the tone in an utterance."""
    samples = row["audio"]["array"]  # type: ignore[index]
    spectrum = np.abs(np.fft.rfft(samples[RATE // 8 : RATE // 8 + RATE // 10]))
    return round((int(spectrum.argmax()) * 10 - hertz(0)) / (hertz(1) - hertz(0)))


def assert_packed(recipe: str) -> RunConfig:
    """The sets of a recipe hold what they should: each utterance with its text, its language and its audio."""
    config = load_config(Path(recipe))
    text, language = TEXTS[recipe]
    (train,) = config.train_data.shards
    dev = config.evaluation.test_sets["dev"].shards
    first = 0
    for folder, size in zip((train, dev, str(Path(dev).with_name("test"))), SIZES, strict=True):
        numbers = range(first, first + size)
        rows = list(ShardDataset(str(Path(folder).resolve())))
        assert [(row["text"], row["language"]) for row in rows] == [(text.format(n), language) for n in numbers]
        assert [heard(row) for row in rows] == list(numbers)
        first += size
    return config


@pytest.mark.parametrize("recipe", TEXTS)
def test_the_commands_of_a_corpus_pack_what_its_recipe_trains_on(recipe, hub, public, run, prompts):
    sources = {shlex.split(line)[3].removeprefix("hf:") for line in commands_of(recipe)}
    hub.datasets = {name: HUB[name]() for name in sources if name in HUB}
    if recipe == "common_voice_german":
        write_common_voice(public / CORPUS)
    for line in commands_of(recipe):
        result = run(line)
        assert result.code == 0, result.err
    config = assert_packed(recipe)
    skipped = [path.read_text().count("\n") for path in public.glob("shards/*/*/skipped.jsonl")]
    assert sum(skipped) == (len(SIZES) if recipe == "voxpopuli_german" else 0)
    used = build_training_set(config.train_data, prompts, config.seed)
    assert sum(stream.num_utterances for stream in used.streams.streams) == SIZES[0]


def test_librispeech_from_openslr_is_the_same_as_from_the_hub(public, run):
    write_openslr(public / "LibriSpeech")
    (block,) = (block for block in blocks() if "LibriSpeech/train-clean-100" in block[0])
    for line in block:
        result = run(line)
        assert result.code == 0, result.err
    assert_packed("librispeech_100h")


@pytest.mark.parametrize(("target", "recipe"), MAKE.items())
def test_make_runs_the_commands_of_the_page(target, recipe):
    command = ["make", "--dry-run", "--old-file=install", target]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    packed = [line.partition(" || ")[2].removeprefix(".venv/bin/") for line in shown.splitlines() if PACK in line]
    assert packed == commands_of(recipe)
    assert f"launch/train.py --config launch/recipes/{recipe}.yaml" in shown


def table() -> dict[str, list[str]]:
    """The cells behind the name of each recipe."""
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE, re.MULTILINE)
    return {recipe: [cell.strip() for cell in cells.split("|")] for recipe, cells in rows}


def estimator(recipe: str, gpu: str) -> Estimator:
    return Estimator(
        load_config(Path(recipe)), Machine(gpu=GPUS[gpu], gpu_memory=GPUS[gpu].memory_bytes), find_workload
    )


def gpus() -> list[str]:
    """The GPUs of the table."""
    (heads,) = re.findall(r"^\| recipe \|(.*)\|$", PAGE, re.MULTILINE)
    return [head.strip() for head in heads.split("|")[3:]]


def test_the_steps_on_the_page_are_those_of_the_recipes_and_one_estimate_holds_for_all(public):
    configs = {recipe: load_config(Path(recipe)) for recipe in MAKE.values()}
    assert {recipe: int(cells[2]) for recipe, cells in table().items()} == {
        recipe: config.num_steps for recipe, config in configs.items()
    }
    alike = [(one.model, one.trainable, one.engine, one.evaluation.batch_size) for one in configs.values()]
    sizes = [(one.train_data.slots_per_step, one.train_data.max_windows) for one in configs.values()]
    assert alike == alike[:1] * len(alike), "one estimate holds for all"
    assert sizes == [(8, 4)] * len(sizes), "steps of 32 clips"


@pytest.mark.slow
def test_the_memory_on_the_page_is_that_of_plan(public):
    run = estimator("multimed_german", "RTX 4090")
    (shape,) = run.workload.candidates
    row = run.row(run.estimate(configured_sharding(run.config.engine, 1), shape))
    assert row.fits
    said = re.search(r"needs (\d+) GB of GPU memory and (\d+) GB of host memory", PAGE)
    assert said is not None
    assert (int(said[1]), int(said[2])) == (round(row.device_bytes / 1e9), math.ceil(row.host_bytes_of_node / 1e9))


@pytest.mark.slow
@pytest.mark.parametrize("gpu", gpus())
def test_the_times_on_the_page_are_those_of_plan(gpu, public):
    run = estimator("multimed_german", gpu)
    seconds = configured_step_time(run, configured_sharding(run.config.engine, 1), GPUS[gpu]).step_seconds
    place = 3 + gpus().index(gpu)
    assert {recipe: cells[place] for recipe, cells in table().items()} == {
        recipe: duration(int(cells[2]) * seconds) for recipe, cells in table().items()
    }

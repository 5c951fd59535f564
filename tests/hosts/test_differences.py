"""A host that would train something else than host 0 is refused on all hosts, before a model is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from network import ALL, Network, Program
from training_runs import GRACE_SECONDS, LIMIT_SECONDS, MISTAKE, TrainingRun, assert_said, ended_after, ended_with

from corpora import NUM_UTTERANCES, SHARD_BYTES, pack_manifest, write_speech_manifest
from runs import ROOT

NewRun = Callable[..., TrainingRun]


def _setting(*words: str) -> Callable[[TrainingRun, Path], list[Program]]:
    more = [part for word in words for part in ("--set", word)]
    return lambda run, _folder: run.start(more={2: more})


def _deepspeed_file(run: TrainingRun, folder: Path) -> list[Program]:
    settings = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    settings["zero_optimization"]["contiguous_gradients"] = False
    other = folder / "other.json"
    other.write_text(json.dumps(settings))
    return _setting(f"engine.deepspeed={other}")(run, folder)


def _model(run: TrainingRun, folder: Path) -> list[Program]:
    shutil.copytree(run.config.model.path, folder / "others" / "model")
    shutil.copytree(run.config.model.path, folder / "own" / "model")
    config = folder / "own" / "model" / "config.json"
    content = config.read_text()
    assert '"rms_norm_eps": 1e-05' in content
    config.write_text(content.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    return _in_own_folder(run, folder, "model.path=model")


def _shards(run: TrainingRun, folder: Path) -> list[Program]:
    for seed, name in enumerate(("others", "own")):
        manifest = write_speech_manifest(folder / f"speech-{seed}", NUM_UTTERANCES, seed=seed)
        pack_manifest(manifest, folder / name / "shards", SHARD_BYTES, skip_bad=False)
    return _in_own_folder(run, folder, "train_data.shards=[shards]")


def _without(name: str, word: str) -> Callable[[TrainingRun, Path], list[Program]]:
    """Host 2 alone lacks a folder."""

    def start(run: TrainingRun, folder: Path) -> list[Program]:
        found = run.config.model.path if name == "model" else run.config.train_data.shards[0]
        shutil.copytree(found, folder / "others" / name)
        (folder / "own").mkdir()
        return _in_own_folder(run, folder, word)

    return start


def _run_dir(run: TrainingRun, folder: Path) -> list[Program]:
    for name in ("others", "own"):
        (folder / name).mkdir()
    return _in_own_folder(run, folder, "run_dir=run")


def _in_own_folder(run: TrainingRun, folder: Path, word: str) -> list[Program]:
    """The same relative path on all hosts; host 2 has another working folder."""
    return run.start(
        more={host: ["--set", word] for host in ALL}, folder=lambda host: folder / ("own" if host == 2 else "others")
    )


def _package(run: TrainingRun, folder: Path) -> list[Program]:
    """Metadata of another version, found before the real one."""
    metadata = folder / "packages" / "transformers-0.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    return run.start(variables={2: {"PYTHONPATH": str(folder / "packages")}})


# What is different on host 2, and what the refusal names.
DIFFERENCES: dict[str, tuple[Callable[[TrainingRun, Path], list[Program]], str]] = {
    "another learning rate": (_setting("optimizer.learning_rate=1e-4"), "`optimizer.learning_rate` is 0.002 on rank 0"),
    "another seed": (_setting("seed=7"), "`seed` is 0 on rank 0"),
    "another `num_steps`": (_setting("num_steps=5"), "`num_steps` is 8 on rank 0"),
    "another `checkpoint.every_steps`": (
        _setting("checkpoint.every_steps=5"),
        "`checkpoint.every_steps` is 2 on rank 0",
    ),
    "another ZeRO stage": (
        _setting(f"engine.deepspeed={ROOT / 'ds_configs' / 'zero2.json'}"),
        "`zero_optimization.stage` in DeepSpeed's file is 3 on rank 0",
    ),
    "another content of DeepSpeed's file": (
        _deepspeed_file,
        "`zero_optimization.contiguous_gradients` in DeepSpeed's file is True on rank 0",
    ),
    "another model": (_model, "the fingerprint of the files of `model.path` is "),
    "another version of a package": (_package, "but 0.0.1 on the ranks [2] (1 of 3; host-2)"),
    "other shards": (_shards, "`train_data`: the ranks [2] see other shards"),
    "no shards": (_without("shards", "train_data.shards=[shards]"), "shards does not exist"),
    "no model": (_without("model", "model.path=model"), "the folder model does not exist"),
    "its own `run_dir`": (_run_dir, "`run_dir`: the ranks [2] (1 of 3) do not see what rank 0 writes"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_difference_is_refused_before_a_model_is_loaded(
    difference: str, network: Network, new_run: NewRun, tmp_path: Path, record
) -> None:
    start, sentence = DIFFERENCES[difference]
    run = new_run()
    # A rank that builds an engine would stay there.
    run.hold(1, "starting")
    programs = start(run, tmp_path)
    ended_with(MISTAKE, programs, LIMIT_SECONDS + GRACE_SECONDS)
    assert_said(sentence, programs)
    record(
        f"{difference} on host 2",
        "ZeRO-3",
        f"refused on all hosts with code {MISTAKE}, before a model is loaded",
        f"{ended_after(programs, programs[0].started_at):.1f}",
    )

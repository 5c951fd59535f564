"""Model cards: metadata that the hub's own classes read, numbers of the stored results, and no trace of the machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from voxtral_dist.config import CardConfig, ErrorRate, RunConfig, dump_config, load_config
from voxtral_dist.exports.layouts import ExportLayout
from voxtral_dist.hub.base_model import hub_name
from voxtral_dist.hub.model_card import CardSubject, model_card
from voxtral_dist.hub.trained_run import TrainedRun
from voxtral_dist.scoring.comparison import compare_pairs, pair_utterances
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.hypotheses import read_scored

from hub_server import HubServer
from saved_results import NUM_STEPS, score_of, select_by_cer, write_run

MINI = "mistralai/Voxtral-Mini-3B-2507"
START = {
    "kind": "event",
    "step": 0,
    "event": "started",
    "world_size": 16,
    "num_steps": NUM_STEPS,
    "num_epochs": 2.5,
    "num_utterances": 5000,
    "skipped": {"longer than `max_duration_seconds`": 12},
    "engine": "FSDP2",
    "device": "NVIDIA H100",
    "versions": {"voxtral-dist": "0.1.0", "torch": "2.13.0"},
    "audio_seconds": {"de": 36_000.0, "en": 7200.0, "unknown": 1800.0},
}
SECRETS = ("s3://key:secret@bucket/set", "/home/alice", "~/noise", "hf_write_0123456789")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> Path:
    """A run with results before, in the middle and after, whose configuration names places of its machine."""
    run_dir = write_run(tmp_path_factory.mktemp("runs") / "alice-tuned", shard_folder)
    tree = load_config(run_dir / "config.yaml").model_dump()
    tree["train_data"] |= {
        "shards": (SECRETS[0],),
        "augmentation": ({"name": "AddBackgroundNoise", "arguments": {"sounds_path": "/home/alice/noise", "p": 0.5}},),
        "context": {"words": "/home/alice/words.txt"},
    }
    tree["storage"]["cache_dir"] = "~/noise"
    (run_dir / "config.yaml").write_text(dump_config(RunConfig.model_validate(tree)))
    rows = (run_dir / "metrics.jsonl").read_text()
    (run_dir / "metrics.jsonl").write_text(json.dumps(START) + "\n" + rows)
    return run_dir


@pytest.fixture(scope="module")
def trained(run_dir: Path) -> TrainedRun:
    return TrainedRun.read(load_config(run_dir / "config.yaml"), run_dir, NUM_STEPS)


def card_of(run: TrainedRun | None, layout: ExportLayout = "hf", path: str = MINI, **changes: Any) -> str:
    return model_card(replace(CardSubject(layout, "float32", path, run=run), **changes))


def folders(run_dir: Path) -> tuple[Path, Path]:
    """The results of the first and the last step."""
    return tuple(run_dir / "evaluations" / f"step-{step:07d}" for step in (0, NUM_STEPS))  # type: ignore[return-value]


def expected_rates(score: dict[str, Any]) -> Iterator[tuple[str, float, list[float] | None]]:
    for metric in ("wer", "cer"):
        interval = [round(100 * one, 2) for one in score[f"{metric}_interval"]]
        yield metric, round(100 * score[metric], 2), interval


def test_the_metadata_is_what_the_run_measured(trained: TrainedRun, run_dir: Path, hub: HubServer) -> None:
    settings = CardConfig(license="apache-2.0", datasets=("someone/speech",))
    text = card_of(trained, settings=settings, repository="someone/voxtral-tuned")
    card = ModelCard(text)
    assert str(card) == text
    card.validate()
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == (MINI, "finetune")
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "automatic-speech-recognition")
    assert (data["license"], data["datasets"]) == ("apache-2.0", ["someone/speech"])
    assert data["language"] == ["de", "en"], "as trained on, the most frequent first"
    assert data["model-index"][0]["name"] == "voxtral-tuned"
    for name in ("speech", "again"):
        score = score_of(folders(run_dir)[1], name)
        results = [one for one in card.data.eval_results if one.dataset_type == name]
        languages = {label: part for label, part in score["slices"]["language"].items() if label != "unknown"}
        assert {one.dataset_config for one in results} == {None, *languages}
        for label, part in {None: score, **languages}.items():
            mine = [
                (one.metric_type, one.metric_value, one.metric_args.get("interval_95"))
                for one in results
                if one.dataset_config == label and "case" not in one.metric_name
            ]
            assert mine == list(expected_rates(part)), label
        (orthographic,) = (one for one in results if "case" in one.metric_name)
        assert orthographic.metric_value == round(100 * score["orthographic"]["wer"], 2)
        assert {one.metric_args["normalizer"] for one in results} == {"basic-3", score["orthographic"]["normalizer"]}


@pytest.mark.parametrize("metric", ["wer", "cer"])
def test_the_tables_compare_before_and_after(run_dir: Path, tmp_path: Path, metric: ErrorRate) -> None:
    run_dir = Path(shutil.copytree(run_dir, tmp_path / "run"))
    if metric == "cer":
        select_by_cer(run_dir)
    text = card_of(TrainedRun.read(load_config(run_dir / "config.yaml"), run_dir, NUM_STEPS))
    before, after = (score_of(folder, "speech") for folder in folders(run_dir))
    paths = tuple(folder / "speech.jsonl" for folder in folders(run_dir))
    pairs = pair_utterances(*(read_scored(path) for path in paths), paths)  # type: ignore[arg-type]
    compared = compare_pairs(pairs, Grouping(), metric)
    assert compared.difference is not None
    assert compared.difference_interval is not None

    def rate(score: dict[str, Any]) -> str:
        return "{:.2f} % [{:.2f}, {:.2f}]".format(*(100 * one for one in (score[metric], *score[f"{metric}_interval"])))

    low, high = (100 * one for one in compared.difference_interval)
    change = f"{100 * compared.difference:+.2f} points [{low:+.2f}, {high:+.2f}]"
    other = "CER" if metric == "wer" else "WER"
    last = f"{other} {100 * after[other.lower()]:.2f} %"
    assert f"| speech | {metric.upper()} | {rate(before)} | {rate(after)} | {change} | {last} |" in text
    assert "### speech by language" in text
    for label, part in after["slices"]["language"].items():
        assert f"| {label} † | {rate(before['slices']['language'][label])} | {rate(part)} |" in text
    assert f"step {NUM_STEPS} with greedy decoding, on weights in float32" in text
    assert "`basic-3`. Intervals are the central 95 % of a bootstrap over speakers" in text


def test_data_and_training_are_described(trained: TrainedRun) -> None:
    text = card_of(trained, settings=CardConfig(data_license="CC-BY-4.0, with names removed"))
    for line in (
        "- Audio: 12.50 h in 4,988 utterances: de 10.00 h, en 2.00 h, unknown 1800.0 s",
        "- Skipped utterances, not counted above: 12 longer than `max_duration_seconds`",
        "- Planned passes over the data: 2.5",
        "- Licence of the data: CC-BY-4.0, with names removed",
        f"- Optimizer updates: {NUM_STEPS} of {NUM_STEPS}",
        "- Engine: FSDP2 on 16 × NVIDIA H100",
        "- Versions: voxtral-dist 0.1.0, torch 2.13.0",
        "Licence of the model: not stated",
    ):
        assert line in text, line


def test_nothing_of_the_machine_and_of_speakers_is_in_a_card(
    trained: TrainedRun, run_dir: Path, shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRETS[-1])
    scored = read_scored(folders(run_dir)[1] / "speech.jsonl")
    speakers = {one.decoded.fields["speaker"] for one in scored}
    private = {*SECRETS, "alice", str(run_dir.parent), str(shard_folder), *speakers}
    private |= {one.decoded.key for one in scored} | {one.decoded.reference for one in scored}
    for layout in ("hf", "mistral", "peft"):
        text = card_of(trained, layout, "/home/alice/models/base")
        assert [one for one in private if one in text] == []
        assert "base_model" not in ModelCard(text).data.to_dict()
    assert "AddBackgroundNoise" in text
    assert "p: 0.5" in text


def test_weights_that_were_not_measured_have_no_results(trained: TrainedRun, run_dir: Path) -> None:
    tree = trained.config.model_dump()
    config = RunConfig.model_validate(tree | {"optimizer": tree["optimizer"] | {"ema_decay": 0.9}})
    assert "- Moving averages of the weights: decay 0.9" in card_of(TrainedRun.read(config, run_dir, NUM_STEPS))
    assert TrainedRun.read(config, run_dir, NUM_STEPS, averages=True).measured == trained.measured
    other_step = TrainedRun.read(config, run_dir, NUM_STEPS - 1)
    of_the_step = TrainedRun.read(config, run_dir, NUM_STEPS, averages=False)
    elsewhere = TrainedRun.read(config, None, NUM_STEPS)
    for run in (other_step, of_the_step, elsewhere):
        text = card_of(run)
        assert "Not measured: the run has no results of exactly these weights" in text
        assert "model-index" not in text
        assert "%" not in text.partition("## Training data")[0]
    assert "Hours and languages: not recorded" in card_of(elsewhere)


def test_conditions_of_a_measurement_that_differ_from_the_export_are_said(trained: TrainedRun) -> None:
    assert "another precision: bfloat16" in card_of(trained, precision="bfloat16")
    tree = trained.config.model_dump()
    tree["trainable"]["lora"] = {"rank": 40, "quantized": ("language_model",)}
    tree["evaluation"]["test_sets"]["speech"] |= {"max_utterances": 26, "detect_language": True}
    run = replace(trained, config=RunConfig.model_validate(tree))
    text = card_of(run, "vllm-lora")
    assert "frozen matrices of language model had four bits" in text
    assert "`speech`: at most 26 utterances, the first ones of the set" in text
    assert "`speech`: the language was not given" in text
    assert "--max-lora-rank 64" in text
    assert "LoRA adapters of rank 40 in language model" in text
    data = ModelCard(text).data.to_dict()
    assert (data["library_name"], data["base_model_relation"]) == ("peft", "adapter")
    assert {"lora", "vllm"} <= set(data["tags"])


def test_a_folder_without_a_run_gets_a_card_that_claims_nothing() -> None:
    text = card_of(None, "mistral", settings=CardConfig(license="apache-2.0"))
    data = ModelCard(text).data.to_dict()
    assert (data["base_model"], data["license"], data["library_name"]) == (MINI, "apache-2.0", "vllm")
    assert not data.keys() & {"model-index", "language", "metrics", "datasets", "base_model_relation"}
    assert "training data and error rates are not stated here" in text
    assert "fine-tuned" not in text
    assert "--tokenizer-mode mistral --config-format mistral --load-format mistral" in text


def test_the_base_model_is_a_name_or_a_folder_of_the_cache(tmp_path: Path) -> None:
    cached = tmp_path / "models--mistralai--Voxtral-Mini-3B-2507" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    assert hub_name(str(cached)) == hub_name(MINI) == MINI
    assert hub_name(str(tmp_path)) is None
    assert hub_name("/models/missing") is None

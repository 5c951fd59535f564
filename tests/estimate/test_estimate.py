"""`voxtral-dist plan`: golden numbers of Voxtral-Mini-3B, the advice, the data, and users' errors."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import huggingface_hub
import pytest
import yaml

from voxtral_dist.cli.main import main
from voxtral_dist.config import TrainDataConfig, load_config
from voxtral_dist.estimate import zero_host_memory
from voxtral_dist.estimate.quantities import gigabytes, parse_bytes
from voxtral_dist.estimate.sharding import Fsdp2Sharding, ZeroSharding, zero_sharding
from voxtral_dist.estimate.workload import WindowSizes, largest_within
from voxtral_dist.model.published import published_config
from voxtral_dist.output.duration import duration

from corpora import REPOSITORY

MINI_SIZES = WindowSizes(seconds=30.0, audio_tokens=375, max_positions=131_072)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The estimate of the recipe for all weights, as JSON."""
    recipe = REPOSITORY / "launch" / "recipes" / "voxtral_mini_full.yaml"
    with pytest.raises(SystemExit) as end:
        main(["plan", "--config", str(recipe), "--json", *arguments])
    captured = capsys.readouterr()
    assert end.value.code == 0, captured.err
    return json.loads(captured.out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.fixture
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in the repository, where recipes find DeepSpeed's files."""
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.usefixtures("in_repository")
def test_figures_of_the_published_3b_model(capsys):
    started = time.process_time()
    estimate = plan(capsys, "--gpus", "8", "--gpu-memory", "80GB")
    assert time.process_time() - started < 10
    assert sum(count["trained"] + count["frozen"] for count in estimate["parameters"].values()) == 4_676_271_104
    assert estimate["parameters"]["encoder"]["frozen"] == 1500 * 1280
    states = sum(estimate["by_kind"]["device"][kind] for kind in ("weights", "gradients", "optimizer"))
    # Rajbhandari et al.: 2 + 4 + 12 bytes a parameter over 8 ranks, and small parameters unsharded.
    assert states / 4_676_271_104 * 8 == pytest.approx(18, rel=0.01)
    assert estimate["configured"]["fits"] is True
    assert estimate["changes"] == []
    rows = {row["name"]: row for row in estimate["table"]}
    assert rows["ZeRO-1"]["device_bytes"] > rows["ZeRO-2"]["device_bytes"] > rows["ZeRO-3"]["device_bytes"]
    assert "ZeRO-0" not in rows
    assert estimate["workload"]["data"] is None
    assert "shards/train" in estimate["workload"]["missing"]
    assert estimate["estimate_is"] == "not yet measured on a GPU"
    # A clip has 375 audio tokens, 10 of the prompt and 60 of a usual transcript. 6 FLOPs a parameter and token of the
    # language model, at least, and as much again at most for the encoder.
    assert 1 < estimate["costs"]["model_flops"] / (4000 * 16 * 8 * 445 * 6 * 4.0e9) < 2


@pytest.mark.usefixtures("in_repository")
@pytest.mark.parametrize("num_gpus", [1, 4])
def test_host_memory_of_offloaded_states(capsys, num_gpus):
    recipe = REPOSITORY / "launch" / "recipes" / "voxtral_mini_offload.yaml"
    options = ("--config", str(recipe), "--gpus", str(num_gpus), "--gpu-memory", "24GB")
    estimate = plan(capsys, *options, "--host-memory", "128GB", "--set", "train_data.slots_per_step=4")
    kinds = estimate["by_kind"]["host"]
    # 12 of the optimizer, 2 x 4 of gradients and 2 of weights, over all ranks of the node; nothing is rounded up.
    states = sum(kinds[kind] for kind in ("weights", "gradients", "optimizer"))
    assert states / 4_676_271_104 == pytest.approx(22, rel=0.001)
    assert kinds.get("cached", 0) == 0
    phases = estimate["host_phases"]
    assert phases["building"] < phases["update"] < phases["saving"]
    assert estimate["configured"]["host_bytes_of_node"] == max(phases.values())
    assert estimate["configured"]["fits"] is (num_gpus == 1)


@pytest.mark.usefixtures("in_repository")
def test_an_older_torch_rounds_pinned_memory_up(capsys, monkeypatch):
    monkeypatch.setattr(zero_host_memory, "exact_pinned_bytes", lambda: None)
    recipe = REPOSITORY / "launch" / "recipes" / "voxtral_mini_offload.yaml"
    estimate = plan(capsys, "--config", str(recipe), "--host-memory", "128GB")
    kinds = estimate["by_kind"]["host"]
    # Gradients that are accumulated are one block of 17.4 GiB, which becomes 32 GiB.
    assert kinds["gradients"] > 2**35
    assert sum(kinds[kind] for kind in ("weights", "gradients", "optimizer")) / 4_676_271_104 > 26
    assert estimate["configured"]["fits"] is False


@pytest.mark.usefixtures("in_repository")
@pytest.mark.parametrize("engine", ["engine.deepspeed=ds_configs/zero2.json", "engine={fsdp2: {}}"])
def test_averages_take_four_bytes_of_each_trained_parameter(capsys, engine):
    def optimizer_bytes(*more: str) -> float:
        options = [part for one in (engine, "trainable.frozen=[encoder]", *more) for part in ("--set", one)]
        estimate = plan(capsys, *options, "--gpus", "4")
        copies.append(estimate["checkpoint_copy_bytes"])
        return estimate["by_kind"]["device"]["optimizer"] * 4

    copies: list[float] = []
    without = optimizer_bytes()
    added = optimizer_bytes("optimizer.ema_decay=0.999") - without
    assert added / 4_039_000_000 == pytest.approx(4, rel=0.01)
    # A checkpoint in the background copies weights, two moments and the average of all ranks of the node.
    assert [one / 4_039_000_000 for one in copies] == pytest.approx([12, 16], rel=0.01)


@pytest.mark.usefixtures("in_repository")
def test_what_does_not_fit_comes_with_what_to_change(capsys):
    machine = ("--gpus", "2", "--gpu-memory", "48GB", "--host-memory", "512GB")
    recomputed = ["model.activation_checkpointing={encoder: 1, language_model: 1}"]
    options = [part for one in ("engine.deepspeed=ds_configs/zero1.json", *recomputed) for part in ("--set", one)]
    kept = plan(capsys, *options[:2], "--set", "model.activation_checkpointing={}", *machine)
    assert any("activation_checkpointing" in change["change"] for change in kept["changes"])
    estimate = plan(capsys, *options, *machine)
    assert estimate["configured"]["fits"] is False
    changes = {change["change"]: change for change in estimate["changes"]}
    assert changes["engine.deepspeed: ds_configs/zero3.json"]["device_bytes"] < estimate["configured"]["device_bytes"]
    assert changes["engine.deepspeed: ds_configs/zero3_offload.json"]["fits"]
    assert changes["trainable.lora: {} (train only adapters)"]["fits"]
    # All blocks are checkpointed already.
    assert not any("activation_checkpointing" in change for change in changes)


@pytest.mark.usefixtures("in_repository")
def test_evaluations_gather_weights_only_where_that_fits(capsys):
    def peak(weights: str, *more: str) -> dict[str, Any]:
        changed = (
            f"evaluation.weights={weights}",
            "train_data.slots_per_step=64",
            "train_data.max_examples=1",
        )
        return plan(capsys, *(part for one in changed for part in ("--set", one)), "--gpus", "64", *more)["configured"]

    gathered, sharded, auto = (peak(weights) for weights in ("gathered", "sharded", "auto"))
    # On 64 ranks each computes so little that 9.4 GB of gathered weights decide.
    assert gathered["peak_at"] == "evaluation"
    assert gathered["device_bytes"] > sharded["device_bytes"]
    assert auto["device_bytes"] == gathered["device_bytes"], "without a limit it fits"
    limit = f"{(gathered['device_bytes'] + sharded['device_bytes']) / 2e9:.3f}GB"
    found = peak("auto", "--gpu-memory", limit)
    assert found["fits"] is True
    assert found["device_bytes"] == sharded["device_bytes"]
    assert peak("gathered", "--gpu-memory", limit)["fits"] is False


@pytest.mark.usefixtures("in_repository")
def test_the_text_says_whether_it_fits_and_what_decides(capsys):
    recipe = REPOSITORY / "launch" / "recipes" / "voxtral_mini_full.yaml"
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(recipe), "--gpus", "1", "--gpu-memory", "24GB"])
    text = capsys.readouterr().out
    for words in (
        "IT DOES NOT FIT",
        "To make it fit",
        "8 windows",
        "not yet measured on a GPU",
        "FSDP2",
        "name the GPU",
    ):
        assert words in text


def test_the_plan_of_the_data_decides_where_there_are_shards(capsys, tmp_path, tiny_model, shard_folder):
    path = tmp_path / "run.yaml"
    config = {
        "run_dir": str(tmp_path / "run"),
        "num_steps": 20,
        "model": {"path": str(tiny_model), "precision": "float32"},
        "train_data": {"shards": [str(shard_folder)], "slots_per_step": 3, "max_examples": 2},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "engine": {"deepspeed": str(REPOSITORY / "ds_configs" / "zero2.json")},
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["plan", "--config", str(path), "--gpus", "2", "--device", "cpu", "--json"])
    assert end.value.code == 0
    estimate = json.loads(capsys.readouterr().out)
    data = estimate["workload"]["data"]
    assert data["num_utterances"] == 26
    # 26 utterances in micro-batches of two, three of them a step.
    assert data["steps_per_epoch"] == 5
    assert data["num_epochs"] == 4
    assert estimate["shape"]["num_examples"] == 2
    assert 0 <= data["padding"] < 1
    # Three slots on two ranks: one of four places is empty.
    assert estimate["costs"]["idle"] == pytest.approx(0.25)
    assert estimate["table"][0]["name"] == "ZeRO-0"

    del config["num_steps"]
    path.write_text(yaml.safe_dump(config | {"num_epochs": 3.9}), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(path), "--gpus", "2", "--device", "cpu", "--json"])
    # 19.5 steps are 20.
    assert json.loads(capsys.readouterr().out) == estimate


@pytest.mark.usefixtures("in_repository")
def test_epochs_without_shards_cost_what_their_steps_do(capsys):
    arguments = ("--set", "num_steps=null", "--set", "num_epochs=2")
    costs = plan(capsys, *arguments)["costs"]
    assert costs["num_steps"] is None
    of_one_step = plan(capsys, "--set", "num_steps=1000")["costs"]
    assert costs["model_flops"] == pytest.approx(of_one_step["model_flops"] / 1000)


def test_users_mistakes_are_sentences(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    recipe = ("--config", "launch/recipes/voxtral_mini_full.yaml")
    assert "--gpu-memory` must be a positive amount" in refusal(capsys, *recipe, "--gpu-memory", "80")
    assert "80XB" in refusal(capsys, *recipe, "--gpu-memory", "80XB")
    assert "--host-memory" in refusal(capsys, *recipe, "--host-memory", "0GB")
    nowhere = refusal(capsys, *recipe, "--set", f"model.path={tmp_path / 'nowhere'}")
    assert "`model.path`" in nowhere
    assert "both" in refusal(capsys, *recipe, "--set", "engine.fsdp2={}")
    assert "slots_per_step" in refusal(capsys, *recipe, "--gpus", "17")
    assert "No configuration" in refusal(capsys)
    assert "fraction" in refusal(capsys, *recipe, "--mfu", "40")


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("80 gib", 80 * 2**30), ("1.5TB", 15 * 10**11), ("512MB", 512 * 10**6)]
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text, "--gpu-memory") == size


def test_numbers_for_people():
    assert gigabytes(12.34e9) == "12.3 GB"
    assert gigabytes(5e6) == "0.005 GB"
    lengths = {3.14: "3.1 s", 9.96: "10 s", 42.4: "42 s", 59.6: "1 min", 3_569: "59 min", 3_571: "1 h 00 min"}
    assert {seconds: duration(seconds) for seconds in lengths} == lengths
    assert duration(7_260) == "2 h 01 min"


@pytest.mark.parametrize(
    ("budgets", "windows", "examples", "positions"),
    [
        ({"max_examples": 4}, 4, 4, 375 + 10 + 448),
        ({"max_examples": 4, "max_duration_seconds": 45}, 8, 4, 2 * 375 + 10 + 448),
        ({"max_windows": 8}, 8, 8, 375 + 10 + 448),
        ({"max_windows": 8, "max_examples": 2}, 8, 2, 4 * 375 + 10 + 448),
        ({"max_tokens": 4000}, 10, 10, 400),
    ],
)
def test_the_largest_micro_batch_within_budgets(budgets, windows, examples, positions):
    shape = largest_within(TrainDataConfig(shards=("none",), **budgets), MINI_SIZES)
    assert (shape.num_windows, shape.num_examples, shape.num_positions) == (windows, examples, positions)
    assert shape.num_examples <= shape.num_target_tokens <= shape.num_examples * 449


def test_a_file_of_deepspeed_is_read_with_its_defaults():
    plain = zero_sharding({"stage": 3})
    assert plain == ZeroSharding(3, has_overlap=True)
    offloaded = zero_sharding(
        {"stage": 3, "reduce_bucket_size": 5e7, "offload_optimizer": {"device": "cpu"}, "overlap_comm": False}
    )
    assert offloaded == ZeroSharding(3, "host", has_overlap=False, reduce_bucket=50_000_000)
    assert offloaded.name == "ZeRO-3, optimizer in host memory"
    assert Fsdp2Sharding(reshards=False).name == "FSDP2, weights kept until the backward pass"


PUBLISHED_RECIPES = sorted((REPOSITORY / "launch" / "recipes").glob("voxtral_*.yaml"))


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Attempts to reach the network, each of which is refused."""
    made: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        made.append(arguments)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    # Offline, the hub's client would not even try.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/nonexistent")
    return made


@pytest.mark.usefixtures("in_repository")
@pytest.mark.parametrize("recipe", PUBLISHED_RECIPES, ids=lambda path: path.stem)
def test_published_models_are_planned_without_files_and_network(recipe, capsys, tmp_path, attempts):
    config = load_config(recipe)
    published_config(config.model.path).save_pretrained(tmp_path)
    num_gpus = min(8, config.train_data.slots_per_step)
    machine = ("--config", str(recipe), "--gpus", str(num_gpus), "--gpu-memory", "80GB", "--host-memory", "512GB")
    by_table = plan(capsys, *machine)
    by_folder = plan(capsys, *machine, "--set", f"model.path={tmp_path}")
    assert not attempts
    assert "tekken.json" in by_folder["workload"].pop("missing")
    assert "shards/train" in by_table["workload"].pop("missing")
    assert by_table == by_folder

"""Runs as users start them: killed, stopped, and on broken data; and what is on disk afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from voxtral_dist.config import EngineConfig, Fsdp2Config, RunConfig
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.stored.tar_members import TAR_BLOCK_BYTES
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError
from voxtral_dist.reporting.results_folder import ReportOptions
from voxtral_dist.scoring.hypotheses import read_scored
from voxtral_dist.scoring.results import percent
from voxtral_dist.train import EXIT_STOPPED, try_to_report
from voxtral_dist.training.metrics_file import read_metrics
from voxtral_dist.training.run_checks import refuse_different_data

from corpora import pack_manifest, write_speech_manifest
from modes import unusual_modes
from ranks import run_ranks
from runs import (
    TIMEOUT_SECONDS,
    finish,
    kill_all,
    launch,
    launch_by_entrypoint,
    launch_by_torchrun,
    run_config,
    scalars_of,
    train_as_users_do,
)

NUM_STEPS = 20


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def losses(run_dir: Path) -> dict[int, float]:
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "train"]
    by_step = {row["step"]: row["loss"] for row in rows}
    assert len(by_step) == len(rows), "every step has one row"
    return by_step


@pytest.fixture(scope="module")
def unbroken(tiny_model: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 20 steps on two ranks that never stopped; the model of every other test here."""
    config = run_config(
        tmp_path_factory.mktemp("runs") / "unbroken",
        tiny_model,
        shard_folder,
        num_steps=NUM_STEPS,
        checkpoint={"every_steps": 6, "keep": 2},
        evaluation={"test_sets": {"same": {"shards": str(shard_folder), "max_utterances": 7}}, "batch_size": 2},
        metrics={"peak_tflops": 0.1},
    )
    ended = train_as_users_do(config, 2)
    assert ended.code == 0, ended.output
    assert "in a micro-batch x 2 accumulated x 2 ranks (`train_data.slots_per_step: 4`)" in ended.output
    assert ended.output.count("\n  reference   ") == ended.output.count("\n  hypothesis  ") == 2, "before and after"
    assert ended.output.count(f"Result of step {NUM_STEPS}: same WER ") == 1
    assert f", report {config.run_dir / 'report.html'}" in ended.output
    return config


def test_a_run_leaves_its_files(unbroken: RunConfig) -> None:
    folder = unbroken.run_dir
    assert list(losses(folder)) == list(range(1, NUM_STEPS + 1))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-0000018", "step-0000020"]
    assert all((path / "complete.json").is_file() for path in (folder / "checkpoints").iterdir())
    assert {path.name for path in (folder / "evaluations").iterdir()} == {"step-0000000", "step-0000020"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_utterances"] == 7
    assert (summary["world_size"], summary["engine"], summary["num_steps"]) == (2, "ZeRO-3", NUM_STEPS)
    # The configured peak is small, so that the utilization of a tiny model is visible.
    assert 0 < summary["model_flops_utilization"] < 1
    assert 0 <= summary["waiting_fraction"] < 1
    assert summary["memory_gigabytes"] > 0.1
    score = json.loads((folder / "evaluations" / "step-0000020" / "same.json").read_text())
    assert summary["wer_after"] == score["wer"]
    counts = score["words"]
    errors = counts["substitutions"] + counts["deletions"] + counts["insertions"]
    assert score["wer"] == errors / counts["reference_length"]
    assert [value for _, value in scalars_of(folder)["evaluation/same/wer"]] == pytest.approx(
        [summary["wer_before"], summary["wer_after"]]
    )
    assert (folder / "config.yaml").is_file()
    figures = (folder / "report.md").read_text()
    assert f"| same | {percent(score['wer'])} |" in figures
    assert f"- Step: {NUM_STEPS}, of 2 evaluated steps" in figures
    # Loss, learning rate, norm of the gradient, WER and CER; and a player for each wrong utterance.
    page = (folder / "report.html").read_text()
    assert page.count("<figure") == 5
    decoded = read_scored(folder / "evaluations" / "step-0000020" / "same.jsonl")
    assert page.count("<audio") == sum(one.words.errors > 0 for one in decoded) > 0
    assert (folder / "export" / "model.safetensors").is_file()
    assert not (folder / "hangs").exists()
    # Servers, colleagues and other tasks may run as other users.
    assert unusual_modes(folder) == {}


def test_a_report_that_fails_fails_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_text("no json\n")
    try_to_report(tmp_path, ReportOptions(normalizer="basic"))
    assert "The report could not be written (UserError: The metrics " in caplog.text
    assert f"`voxtral-dist report {tmp_path}`" in caplog.text


def shared_buffers(process: subprocess.Popen[str]) -> list[str]:
    """Names in /dev/shm of the buffers through which a run's ranks communicate on CPUs."""
    port = next(word for word in cast(list[str], process.args) if "master_port" in word).partition("=")[2]
    return [path.name for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*")]


def test_killed_in_the_middle_and_started_again_is_the_run_that_never_stopped(unbroken: RunConfig) -> None:
    config = unbroken.model_copy(update={"run_dir": unbroken.run_dir.with_name("killed")})
    first = launch(config, 2)
    # Past the checkpoint of step 6, before that of step 12: work is lost, and must be done again alike.
    saved = config.run_dir / "checkpoints" / "step-0000006" / "complete.json"
    wait_until(lambda: max(losses(config.run_dir), default=0) >= 8 and saved.is_file(), first)
    kill_all(first)
    assert shared_buffers(first) == [], "of ranks that are killed"
    assert max(losses(config.run_dir)) < NUM_STEPS
    second = train_as_users_do(config, 2)
    assert second.code == 0, second.output
    assert "Training from step" in second.output
    assert losses(config.run_dir) == losses(unbroken.run_dir)
    # In TensorBoard the steps that were done twice appear once.
    shown = scalars_of(config.run_dir)["train/loss"]
    assert shown == [(step, pytest.approx(loss)) for step, loss in losses(unbroken.run_dir).items()]
    rows = [row for row in read_metrics(config.run_dir / "metrics.jsonl") if row["kind"] == "train"]
    known = [row["model_flops"] for row in read_metrics(unbroken.run_dir / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["model_flops"] for row in rows] == known
    assert all(0 <= row["waiting_seconds"] < row["step_seconds"] for row in rows)
    assert all(row["model_flops_utilization"] > 0 for row in rows)


def test_sigterm_saves_and_the_same_command_resumes(unbroken: RunConfig) -> None:
    # With worker processes, which launchers signal too.
    train_data = unbroken.train_data.model_copy(update={"num_workers": 1})
    config = unbroken.model_copy(
        update={
            "run_dir": unbroken.run_dir.with_name("stopped"),
            "train_data": train_data,
            "checkpoint": unbroken.checkpoint.model_copy(update={"every_steps": 1000}),
        }
    )
    first = launch_by_entrypoint(config, 2)
    wait_until(lambda: max(losses(config.run_dir), default=0) >= 3, first)
    first.send_signal(signal.SIGTERM)
    output = finish(first)
    assert first.returncode == EXIT_STOPPED, output
    assert "by a signal" in output
    assert "Traceback" not in output
    stopped_at = max(losses(config.run_dir))
    assert stopped_at < NUM_STEPS
    assert (config.run_dir / "checkpoints" / f"step-{stopped_at:07d}" / "complete.json").is_file()
    second = train_as_users_do(config, 2, "metrics.peak_tflops=0.2")
    assert second.code == 0, second.output
    assert losses(config.run_dir) == losses(unbroken.run_dir)
    # What the second command changed is printed and recorded.
    assert second.output.count(f"Changed since step {stopped_at}: `metrics.peak_tflops`: 0.1 -> 0.2") == 1
    events = [row for row in read_metrics(config.run_dir / "metrics.jsonl") if row.get("event") == "changed"]
    assert [(row["step"], row["key"], row["before"], row["now"]) for row in events] == [
        (stopped_at, "metrics.peak_tflops", 0.1, 0.2)
    ]


@pytest.mark.slow
def test_fsdp2_started_by_torchrun_is_the_same_run(unbroken: RunConfig, tmp_path: Path) -> None:
    # What a killed build of DeepSpeed left is none of its business.
    lock = tmp_path / "extensions" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    run_dir = unbroken.run_dir.with_name("torchrun")
    config = unbroken.model_copy(update={"run_dir": run_dir, "engine": EngineConfig(fsdp2=Fsdp2Config())})
    process = launch_by_torchrun(config, 2, {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")})
    output = finish(process)
    assert process.returncode == 0, output
    assert losses(run_dir) == pytest.approx(losses(unbroken.run_dir), rel=1e-4)
    assert json.loads((run_dir / "summary.json").read_text())["engine"] == "FSDP2"
    for result in ("step-0000020/same.jsonl", "step-0000000/same.jsonl"):
        theirs = (unbroken.run_dir / "evaluations" / result).read_text()
        assert (run_dir / "evaluations" / result).read_text() == theirs
    sizes = [(folder / "export" / "model.safetensors").stat().st_size for folder in (run_dir, unbroken.run_dir)]
    assert sizes[0] == sizes[1]


def test_too_many_bad_utterances_end_the_run(unbroken: RunConfig, tmp_path: Path) -> None:
    manifest = write_speech_manifest(tmp_path / "speech", 30)
    pack_manifest(manifest, tmp_path / "shards", 10**8, skip_bad=False)
    index = read_index([tmp_path / "shards"])
    for utterance_id in (3, 11):
        garble(Path(index.span(utterance_id).location), index.span(utterance_id).offset + TAR_BLOCK_BYTES)
    train_data = unbroken.train_data.model_copy(update={"shards": (str(tmp_path / "shards"),)})
    config = unbroken.model_copy(
        update={"run_dir": tmp_path / "run", "train_data": train_data, "evaluation": type(unbroken.evaluation)()}
    )
    ended = train_as_users_do(config, 2, "num_steps=40", "train_data.max_bad_fraction=0.01")
    assert ended.code == 2
    assert "`train_data.max_bad_fraction` (0.01)" in ended.output
    assert "Traceback" not in ended.output


def test_more_ranks_than_slots_are_refused_before_a_model_is_loaded(unbroken: RunConfig, tmp_path: Path) -> None:
    config = unbroken.model_copy(update={"run_dir": tmp_path / "run"})
    ended = train_as_users_do(config, 2, "train_data.slots_per_step=1")
    assert ended.code == 2
    assert ended.output.count("voxtral-dist: error:") == 1
    assert "1 rank," in ended.output
    assert "Traceback" not in ended.output


def garble(path: Path, offset: int) -> None:
    """Overwrite the start of an utterance's audio, which follows its tar header, so that it no longer decodes."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 64)


def refusal_of_fingerprint(world: World, fingerprints: list[str]) -> str | None:
    try:
        refuse_different_data(fingerprints[world.rank], world)
    except UserError as error:
        return str(error)
    return None


def test_ranks_with_other_data_than_rank_0_are_refused_on_all_ranks() -> None:
    assert run_ranks(2, refusal_of_fingerprint, ["same", "same"]) == [None, None]
    sentences = run_ranks(2, refusal_of_fingerprint, ["these", "those"])
    assert sentences[0] == sentences[1]
    assert "the ranks [1] see other shards, another index or other context words than rank 0" in sentences[0]

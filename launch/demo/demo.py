"""The whole pipeline on one small machine: make a corpus, pack it, train with ZeRO-3, measure, transcribe.

    make demo

Every step is the command that a user types; nothing here reaches into the package.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot

from leash import end_with_make, run_leashed

BUILD = Path("build/demo")
RUN = Path("runs/demo")
RECIPE = Path("launch/recipes/demo.yaml")
BIN = Path(sys.executable).parent
NUM_SHOWN_CLIPS = 3
NUM_RANKS = 2


def main() -> None:
    """Run all steps and end with one line that reports the word error rate."""
    started = time.monotonic()
    end_with_make()
    make_corpus()
    run("deepspeed", "--num_accelerators", NUM_RANKS, "launch/train.py", "--config", RECIPE)
    transcribe_held_out_clips()
    plot_run(RUN / "metrics.jsonl", RUN / "curves.png")
    summary = json.loads((RUN / "summary.json").read_text(encoding="utf-8"))
    print(f"plot: {RUN / 'curves.png'}, summary: {RUN / 'summary.json'}, {time.monotonic() - started:.0f} s in all")
    print(
        f"WER {100 * summary['wer_before']:.1f} % -> {100 * summary['wer_after']:.1f} %  "
        f"(held-out voices, {summary['num_utterances']} utterances)"
    )


def make_corpus() -> None:
    """Prepare corpus, shards and an untrained model; a finished run is removed, an interrupted one is resumed."""
    if (RUN / "summary.json").exists():
        shutil.rmtree(RUN)
    if RUN.exists():
        return
    shutil.rmtree(BUILD, ignore_errors=True)
    run("python", "launch/demo/corpus.py", BUILD / "corpus")
    for part in ("train", "test"):
        run("voxtral-dist", "shards", "pack", BUILD / "corpus" / f"{part}.jsonl", BUILD / "shards" / part)
    run("voxtral-dist", "tiny", BUILD / "model")


def transcribe_held_out_clips() -> None:
    """Print reference and hypothesis of some test clips side by side."""
    manifest = (BUILD / "corpus" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = random.Random(0).sample([json.loads(line) for line in manifest], NUM_SHOWN_CLIPS)
    print(f"\n{'clip':<28}{'reference':<32}hypothesis")
    for row in rows:
        clip = BUILD / "corpus" / row["audio_filepath"]
        command = ["voxtral-dist", "transcribe", RUN / "export", clip, "--language", row["lang"]]
        code, printed = run_leashed(commandline(command), stdout=subprocess.PIPE)
        if code:
            sys.exit(code)
        hypothesis = printed.strip().partition("\t")[2]
        print(f"{clip.name:<28}{row['text']:<32}{hypothesis}", flush=True)
    print()


def plot_run(metrics: Path, out: Path) -> None:
    """Plot loss and word error rate over steps as PNG."""
    mpl.use("Agg")
    losses = [(row["step"], row["loss"]) for row in rows_of_kind(metrics, "train") if row["loss"] is not None]
    rates = [(row["step"], 100 * row["wer"]) for row in rows_of_kind(metrics, "evaluation")]
    figure, loss_axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    wer_axis = loss_axis.twinx()
    loss_axis.plot(*zip(*losses, strict=True), color="tab:blue", linewidth=0.8)
    wer_axis.plot(*zip(*rates, strict=True), color="tab:red", marker="o")
    loss_axis.set(xlabel="step", yscale="log", title="A tiny Voxtral from scratch, ZeRO-3 on two ranks")
    loss_axis.set_ylabel("training loss (nats per target token)", color="tab:blue")
    wer_axis.set_ylabel("WER on held-out voices (%)", color="tab:red")
    wer_axis.set_ylim(bottom=0)
    figure.savefig(out, dpi=120)


def rows_of_kind(metrics: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The rows of `metrics.jsonl` of one kind."""
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == kind:
            yield row


def run(*command: object) -> None:
    """Print a command and run it; exit with its code if it fails."""
    print("$", *command, flush=True)
    code, _ = run_leashed(commandline(list(command)))
    if code:
        sys.exit(code)


def commandline(command: list[Any]) -> list[str]:
    """The arguments of a command, its program taken from this environment."""
    program, *words = map(str, command)
    return [str(BIN / program), *words]


if __name__ == "__main__":
    main()

"""Speed of the data path, from shards to collated batches: voxtral-dist and four rivals on the same tars.

    python benchmarks/data_path.py --output data_path.json [--quick]

Rivals: (a) webdataset, (b) Hugging Face `datasets` streaming, (c) megatron-energon, (d) lhotse Shar with dynamic
bucketing. All decode with libsndfile and end in `VoxtralProcessor`, like scripts that fine-tune Voxtral on one GPU.
Each runs in its own environment from `make rivals`, in one process without workers and with one thread. Contenders take
turns; each measurement is a fresh process and starts after a first batch. The unit is audio seconds per core second
(user and system); results are medians.

`ratio` is voxtral-dist over (a) on utterances as long as LibriSpeech's. Our path ends where our workers end, with int16
windows, because features are computed on the model's device, a GPU in training. `ratio_with_features` includes them on
the same core, as in training without a GPU.

Predicted before the first run, from 1,237 and 197 audio seconds per core second measured during the design: a `ratio`
of 6.3, and about 1.3 with features, because the Fourier transform then dominates both; (b), (c) and (d) within 20 % of
(a) for the same reason.

First measurement: 5.4, and 1.4 with features; the rivals are within 9 % of each other. Two thirds of our time are spent
in libFLAC, which decodes 7,400 audio seconds per core second and limits the ratio to 7.6. On AN4's short clips the
ratio is 9.9, because a rival transforms 30 s of silence for every clip. Since then, the windows of a micro-batch are
allocated once, not twice per clip, and plain tar headers are read without `tarfile`: 6.2, and 10.9 on short clips.
Reading FLAC from a file instead of from memory was no faster.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rivals.launch import Contender, ours, prepare, rivals
from workloads.command import run
from workloads.speech import Corpus, write_librispeech_like, write_model, write_short_clips

BATCH_SIZE = 8
NOTES = {
    "webdataset": "seeded shuffles of shards and of a buffer of 100 utterances",
    "datasets": "audio is passed on as bytes and decoded with soundfile, because its own decoding needs torchcodec",
    "energon": "its own indexes beside the tars, crude samples, a task encoder and a savable loader",
    "lhotse": "tars converted to Shar without re-encoding; batches of equal duration, not of equal size",
    "ours": "int16 windows, because features are computed on the model's device",
    "ours_with_features": "the same, and log-mel features on the same core",
}


def measure(folder: Path, is_quick: bool) -> dict[str, Any]:
    """Measure all contenders on all corpora."""
    model = write_model(folder / "model")
    corpora = {"librispeech_like": write_librispeech_like(folder / "long", 16 if is_quick else 240)}
    if not is_quick:
        corpora["short_clips"] = write_short_clips(folder / "short", 400)
    contenders = [ours(), *rivals(is_quick)]
    num_rounds, num_examples = (1, 8) if is_quick else (5, 240)
    rounds = {
        name: _rounds(contenders, corpus, model, folder / f"prepared-{name}", num_rounds, num_examples)
        for name, corpus in corpora.items()
    }
    medians = {name: {path: _median(rows) for path, rows in by_path.items()} for name, by_path in rounds.items()}
    speeds = medians["librispeech_like"]
    return {
        "ratio": speeds["ours"] / speeds["webdataset"],
        "ratio_with_features": speeds["ours_with_features"] / speeds["webdataset"],
        "ratio_is": "audio seconds per core second of ours over webdataset, on librispeech_like",
        "median": medians,
        "how": NOTES,
        "environments": {contender.name: contender.environment for contender in contenders},
        "corpora": {
            name: {
                "source": corpus.source,
                "num_examples": corpus.num_examples,
                "mean_seconds": corpus.mean_seconds,
            }
            for name, corpus in corpora.items()
        },
        "batch_size": BATCH_SIZE,
        "rounds": rounds,
    }


def _rounds(
    contenders: Sequence[Contender], corpus: Corpus, model: Path, folder: Path, num_rounds: int, num_examples: int
) -> dict[str, list[dict[str, Any]]]:
    request = {
        "task": "speed",
        "shards": str(corpus.shards),
        "model": str(model),
        "batch_size": BATCH_SIZE,
        "num_examples": num_examples,
        "mean_seconds": corpus.mean_seconds,
    }
    asked = [(one.name, one, prepare(one, request, folder / one.name)) for one in contenders]
    asked.append(("ours_with_features", ours(), request | {"with_features": True}))
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in asked}
    for _ in range(num_rounds):
        for name, contender, prepared in asked:
            rows[name].append(contender.ask(prepared))
    return rows


def _median(rows: Sequence[dict[str, Any]]) -> Any:
    """The median speed, or the row with the reason why there is none."""
    if "not_run" in rows[0]:
        return rows[0]
    return statistics.median(row["audio_seconds_per_core_second"] for row in rows)


if __name__ == "__main__":
    run(__doc__, measure, ("ratio", "ratio_with_features", "median"))

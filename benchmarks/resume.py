"""Resuming an epoch: time to the first batch, and missing or repeated utterances.

    python benchmarks/resume.py --output resume.json [--quick]

A run of two ranks is stopped at 0, 10, 50 and 90 % of an epoch and resumed with two, three and four ranks, by each
framework's documented method: webdataset stores no state, so its users skip what was already read; `datasets` and
lhotse have state dictionaries, energon savable loaders. If a framework cannot do it, the result is the reason in words.

    exactness     missing and repeated utterances, compared with an uninterrupted run of the same framework; with the
                  same number of ranks, also whether the batches are equal
    first_batch   seconds from the construction of the loader of rank 0 to its first collated batch, with many more
                  utterances, in fresh processes that take turns; medians. Ours returns all batches of a rank's step at
                  once, which are twice as many examples as the others return
    large_index   ours on an index of 100 million utterances without audio: seconds and memory of a fresh process, with
                  the index in the node's page cache and, once, without

`ratio` is the time to the first batch after a stop at 50 %, webdataset over ours.

Predicted before the first run: ours under 0.1 s and exact in all cases; webdataset 10 times as long at 50 % because it
reads all tars up to that point, exact with the same number of ranks and off by a fourth with others; `datasets` loses
its shuffle buffer; lhotse is exact, as slow as webdataset, and refuses other numbers of ranks; energon is exact and
takes less than a second. For 100 million utterances 0.1 s and a few megabytes.

First measurement, on shards of 8,000 clips: ours 0.07 to 0.15 s and exact in all cases, so a `ratio` of 3.4 to 3.8. The
time of the others grows with the position: webdataset 0.15 to 0.40 s, lhotse 0.15 to 1.6, `datasets` 0.20 to 0.60;
energon takes 0.8 to 1.3 s, and up to 3.3 with four ranks, to start its workers. webdataset misses and repeats up to
28 % with other numbers of ranks, `datasets` misses up to 10 % with the same number. For 100 million utterances ours
first took 0.6 s and 20 megabytes, more than predicted, because the plan looked at eight whole megabatches to know its
steps, and 2.4 s if the index was not in the page cache; with fewer and smaller probes 0.1 s and 5 megabytes.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voxtral_dist.data.stored.index_files import INDEX_FILE
from voxtral_dist.data.stored.shard_set import Records

from rivals.launch import REPOSITORY, Contender, ours, prepare, rivals
from workloads.command import run
from workloads.indexes import write_generated_set
from workloads.lengths import librispeech_durations, text_tokens
from workloads.speech import Corpus, write_model, write_short_clips

BATCH_SIZE = 8
NUM_ROUNDS = 3
WORLD_SIZE = 2
OTHER_WORLD_SIZES = (3, 4)


def measure(folder: Path, is_quick: bool) -> dict[str, Any]:
    """Measure exactness on a small corpus, times on a large one, and plans on an index without audio."""
    model = write_model(folder / "model")
    percents = (50,) if is_quick else (0, 10, 50, 90)
    contenders = [ours(), *rivals(is_quick)]
    small = write_short_clips(folder / "small", 64 if is_quick else 800)
    exactness = {
        one.name: one.ask(
            prepare(one, _request("exactness", small, model, percents), folder / "prepared-small" / one.name)
        )
        for one in ([] if is_quick else contenders)
    }
    large = small if is_quick else write_short_clips(folder / "large", 8000)
    worlds = (WORLD_SIZE,) if is_quick else (WORLD_SIZE, max(OTHER_WORLD_SIZES))
    places = [(percent, world_size) for percent in percents for world_size in worlds]
    request = _request("stop", large, model, percents)
    seconds = _first_batches(contenders, request, places, folder, num_rounds=1 if is_quick else NUM_ROUNDS)
    medians = {name: {place: _median(rows) for place, rows in places.items()} for name, places in seconds.items()}
    place = f"at 50 %, {WORLD_SIZE} ranks"
    return {
        "ratio": medians["webdataset"][place] / medians["ours"][place],
        "ratio_is": f"seconds to the first batch of webdataset over ours, {place}",
        "first_batch_seconds": medians,
        "exactness": exactness,
        "large_index": _large_index(folder / "bare", model, percents, is_quick),
        "environments": {one.name: one.environment for one in contenders},
        "corpora": {"exactness": _described(small), "first_batch": _described(large)},
        "first_batch_rounds": seconds,
    }


def _request(task: str, corpus: Corpus, model: Path, percents: Sequence[int]) -> dict[str, Any]:
    return {
        "task": task,
        "shards": str(corpus.shards),
        "model": str(model),
        "batch_size": BATCH_SIZE,
        "mean_seconds": corpus.mean_seconds,
        "world_size": WORLD_SIZE,
        "other_world_sizes": OTHER_WORLD_SIZES,
        "percents": percents,
    }


def _first_batches(
    contenders: Sequence[Contender],
    request: dict[str, Any],
    places: Sequence[tuple[int, int]],
    folder: Path,
    num_rounds: int,
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Answers by contender and by place: percent of the epoch at the stop, and number of ranks that resume."""
    requests, failures = {}, {}
    for one in contenders:
        states = folder / "states" / one.name
        states.mkdir(parents=True)
        requests[one.name] = prepare(one, request, folder / "prepared-large" / one.name) | {"states": str(states)}
        answer = one.ask(requests[one.name])
        if "not_run" in answer:
            failures[one.name] = answer
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {one.name: {} for one in contenders}
    for _ in range(num_rounds):
        for percent, world_size in places:
            for one in contenders:
                wanted = {"task": "first_batch", "percents": [percent], "world_size": world_size}
                place = rows[one.name].setdefault(f"at {percent} %, {world_size} ranks", [])
                place.append(failures.get(one.name) or one.ask(requests[one.name] | wanted))
    return rows


def _median(rows: Sequence[dict[str, Any]]) -> Any:
    """The median seconds, or the row with the reason why there are none."""
    return statistics.median(row["seconds"] for row in rows) if "seconds" in rows[0] else rows[0]


def _large_index(folder: Path, model: Path, percents: Sequence[int], is_quick: bool) -> list[dict[str, Any]]:
    """Time plans over an index of 100 million utterances with the lengths of LibriSpeech."""
    num_utterances = 100_000 if is_quick else 100_000_000
    durations = librispeech_durations(min(num_utterances, 1_000_000), seed=0)
    duration_ms = np.rint(durations * 1000).astype(np.uint32)
    tokens = text_tokens(durations, seed=1)

    def fill(records: Records, _first: int) -> None:
        records["duration_ms"] = duration_ms[: len(records)]
        records["num_text_tokens"] = tokens[: len(records)]

    write_generated_set(folder, num_utterances, fill)
    rows = [{"percent": percent, "page_cache": "warm"} | _plan_times(folder, model, percent) for percent in percents]
    if not is_quick:
        _forget(folder / INDEX_FILE)
        rows.append({"percent": 50, "page_cache": "cold"} | _plan_times(folder, model, 50))
    return rows


def _forget(file: Path) -> None:
    """Drop a file from the page cache, as on a node that has never read it."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _plan_times(folder: Path, model: Path, percent: int) -> dict[str, Any]:
    script = REPOSITORY / "benchmarks" / "workloads" / "plan_times.py"
    command = [sys.executable, str(script), str(folder), str(model), str(percent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _described(corpus: Corpus) -> dict[str, Any]:
    return {"source": corpus.source, "num_examples": corpus.num_examples, "mean_seconds": corpus.mean_seconds}


if __name__ == "__main__":
    run(__doc__, measure, ("ratio", "first_batch_seconds", "large_index"))

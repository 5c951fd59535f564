"""Time and memory that a fresh process needs to resume over an index, until it knows the utterances of a slot.

`resume.py` starts it with the shards, the model and the position in the epoch in percent; it prints one line of JSON.
"""

import json
import sys
import time
from pathlib import Path

from voxtral_dist.config import TrainDataConfig
from voxtral_dist.data.stored.index import read_index
from voxtral_dist.data.training_set import build_training_set
from voxtral_dist.model.prompts import VoxtralPrompts


def main() -> None:
    """Measure once: a second time in the same process, everything would be in memory."""
    shards, model, percent = sys.argv[1:]
    prompts = VoxtralPrompts.from_pretrained(model)
    config = TrainDataConfig(shards=(shards,), slots_per_step=64, max_examples=16)
    memory = _resident_bytes()
    started = time.perf_counter()
    index = read_index(config.shards)
    opened = time.perf_counter()
    plan = build_training_set(config, prompts, seed=0).plan
    planned = time.perf_counter()
    step = plan.steps_per_epoch * int(percent) // 100
    plan.slot(step, 0)
    found = time.perf_counter()
    added = {name: num_bytes - memory[name] for name, num_bytes in _resident_bytes().items()}
    answer = {
        "num_utterances": len(index),
        "step": step,
        "open_index_seconds": opened - started,
        "plan_seconds": planned - opened,
        "slot_seconds": found - planned,
        "memory_added_bytes": added,
    }
    print(json.dumps(answer))


def _resident_bytes() -> dict[str, int]:
    """Resident bytes of this process alone, and of files that it shares with others through the page cache."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("own", "RssAnon"), ("shared", "RssFile"))}


if __name__ == "__main__":
    main()

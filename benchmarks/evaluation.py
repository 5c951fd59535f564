"""Utterances per second of an evaluation under ZeRO-3: ours against `Seq2SeqTrainer` with `predict_with_generate`.

    python benchmarks/evaluation.py --output evaluation.json [--quick]

A tiny Voxtral with the published window, trained for a minute so that its transcripts end by themselves, decodes 300
utterances of 1 to 29 s in random order: float32, batches of 8, greedy, 2 ranks over gloo with one thread each, the same
DeepSpeed configuration. Contenders take turns, each in two fresh processes. The time is from sharded weights to texts;
ours includes scoring and writing. The benchmark fails if hypotheses differ before our token limit of the utterance.

`ratio` is our rate divided by the rival's, both medians. `lockstep_ratio` is the same without gathering the weights, as
ours decodes where a whole copy does not fit: sorting by length, ending at the batch's own limits, and gathering whole
blocks at once remain.

The second part is about decoding alone, in one process: the same model decodes utterances of 1 to 29 s in random order,
and no hypothesis ends before its limit, so lengths are 22 to 190 tokens. `generate_ratio` compares continuous batching
with transformers' `generate` on the same batches, each of which ends with its longest hypothesis. `continuous_ratio`
compares it with the same code batch by batch: rows that end leave a batch, but none enters. Core seconds, in turns.
`steps_ratio` is the number of forward passes of the latter by that of the former: a pass over 8 rows takes a GPU as
long as one over 1. transformers' own continuous batching cannot take part: the result says what its requests consist
of, and that is token ids, without features or embeddings of audio.

Predicted before the first run with continuous batching: `ratio` 5.6 to 7, because a quarter of our time in a profile
went into linear layers that DeepSpeed replaces for the whole process; the largest part of the rest is features, encoder
and prompts, which are as they were. `generate_ratio` 2.5 and `continuous_ratio` 1.3; a first
run of 24 utterances gave 1.5 and 1.0: on a CPU a step costs in proportion to its rows, so rows that leave gain all that
there is to be gained, and who enters their place gains nothing more.

Predicted when only batches were decoded: `ratio` 4 to 8 (it was 4.7), because on the rival's side DeepSpeed's hooks run
for each layer and token, all ranks wait for the longest transcript of every batch, and batches mix short and long
utterances.
"""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from voxtral_dist.model.tiny import TinyShape, build_tiny_voxtral

from rivals.launch import REPOSITORY
from rivals.training_runs import TrainingRun
from workloads.command import run
from workloads.continuous import one_process
from workloads.fitted import fit
from workloads.speech import clips_of_seconds, source, write_clips

OURS, TRAINER = "voxtral_dist_evaluation.py", "trainer_evaluation.py"
LOCKSTEP = "ours in lockstep"
SHAPE = TinyShape(
    window_seconds=30.0,
    vocab_size=2048,
    encoder_width=64,
    encoder_layers=4,
    encoder_heads=2,
    text_width=128,
    text_layers=6,
    text_heads=4,
    text_kv_heads=2,
    text_ffn_width=256,
)
NUM_RANKS, BATCH_SIZE, NUM_ROUNDS = 2, 8, 2
NUM_UTTERANCES, NUM_FIT_STEPS = 300, 80
SHORTEST_SECONDS, LONGEST_SECONDS = 1.0, 29.0
MAX_TOKENS_PER_SECOND = 6.0
# Our token limit of the longest utterance: see `BatchDecoder`.
MAX_NEW_TOKENS = 16 + int(MAX_TOKENS_PER_SECOND * LONGEST_SECONDS)

Answers = list[dict[str, Any]]


def measure(folder: Path, is_quick: bool) -> dict[str, Any]:
    """Measure all contenders in turns."""
    num_utterances, num_steps, num_rounds = (12, 12, 1) if is_quick else (NUM_UTTERANCES, NUM_FIT_STEPS, NUM_ROUNDS)
    asked = _run(folder, num_utterances, num_steps)
    contenders = {
        "ours": (asked, OURS),
        "trainer": (asked, TRAINER),
        LOCKSTEP: (replace(asked, folder=folder / "lockstep", weights_in_evaluations="sharded"), OURS),
    }
    rounds: dict[str, list[Answers]] = {name: [] for name in contenders}
    for number in range(num_rounds):
        for name, (request, script) in contenders.items():
            # Lockstep takes long, and is measured once.
            if number == 0 or name != LOCKSTEP:
                rounds[name].append(request.measure(script, number))
    num_ended = _refuse_different(rounds)
    rates = {
        name: statistics.median(num_utterances / max(rank["seconds"] for rank in answers) for answers in answered)
        for name, answered in rounds.items()
    }
    return {
        "ratio": rates["ours"] / rates["trainer"],
        "ratio_is": "utterances per second, ours by those of Seq2SeqTrainer with predict_with_generate, under ZeRO-3",
        "lockstep_ratio": rates[LOCKSTEP] / rates["trainer"],
        "core_seconds_ratio": _core_seconds(rounds["trainer"]) / _core_seconds(rounds["ours"]),
        "utterances_per_second": rates,
        "num_utterances": num_utterances,
        "num_hypotheses_that_ended": num_ended,
        "num_repeated_utterances_of_trainer": rounds["trainer"][0][0]["num_repeated_utterances"],
        "weights": {name: answered[0][0].get("weights") for name, answered in rounds.items()},
        "tokens_at_most": MAX_NEW_TOKENS,
        **one_process(asked.model, asked.shards, num_utterances // 5, num_rounds),
        "source": source(),
        "rounds": {
            name: [[{key: rank[key] for key in ("seconds", "core_seconds")} for rank in ranks] for ranks in answered]
            for name, answered in rounds.items()
        },
    }


def _run(folder: Path, num_utterances: int, num_steps: int) -> TrainingRun:
    seconds = np.random.default_rng(0).uniform(SHORTEST_SECONDS, LONGEST_SECONDS, num_utterances)
    files = write_clips(folder / "corpus", clips_of_seconds(seconds.tolist()))
    untrained, model = folder / "untrained", folder / "model"
    build_tiny_voxtral(untrained, SHAPE)
    shards = files.corpus.shards
    fit(untrained, shards, model, num_utterances=min(64, num_utterances), batch_size=8, num_steps=num_steps)
    return TrainingRun(
        model=str(model),
        shards=str(shards),
        utterances=files.clips,
        folder=folder,
        world_size=NUM_RANKS,
        batch_size=BATCH_SIZE,
        slots_per_step=NUM_RANKS,
        num_steps=1,
        deepspeed=str(REPOSITORY / "ds_configs" / "zero3.json"),
        max_tokens_per_second=MAX_TOKENS_PER_SECOND,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def _core_seconds(rounds: list[Answers]) -> float:
    return statistics.median(sum(rank["core_seconds"] for rank in answers) for answers in rounds)


def _refuse_different(rounds: dict[str, list[Answers]]) -> int:
    """Compare all hypotheses up to our token limit. Returns how many of ours ended by themselves.

    Raises:
        RuntimeError: hypotheses differ.
    """
    ours = rounds["ours"][0][0]
    for name, answered in rounds.items():
        for answers in answered:
            theirs = [text.strip() for text in answers[0]["hypotheses"]]
            different = [
                number
                for number, (mine, other) in enumerate(zip(ours["hypotheses"], theirs, strict=True))
                if not (other.startswith(mine) if ours["hit_limit"][number] else other == mine)
            ]
            if different:
                raise RuntimeError(f"`{name}` gives different hypotheses from ours for utterances {different[:5]}.")
    return ours["hit_limit"].count(False)


if __name__ == "__main__":
    run(
        __doc__,
        measure,
        (
            "ratio",
            "lockstep_ratio",
            "generate_ratio",
            "continuous_ratio",
            "steps_ratio",
            "core_seconds_ratio",
            "utterances_per_second",
        ),
    )

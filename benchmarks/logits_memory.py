"""Memory of the logits: ours for target positions only, against labels and logits of every position.

    python benchmarks/logits_memory.py --output logits_memory.json [--quick]

The batch has 8 clips of 30 s with transcripts of 60 to 100 tokens. The model has tiny widths, but the published window
and vocabulary of 131,072, so that logits are nearly all of its memory. Ours is `LossOfMicroBatch`, as training calls
it; the other is the same model called with labels, which is Hugging Face's own loss. Each forward and backward pass
runs in a fresh process, in turns; results are medians of the peak resident memory above that before the step. Both
losses are compared.

`ratio` is the peak of all positions over ours, in bfloat16.

Predicted before the first run: a `ratio` of 4.5 in both precisions. 484 positions with logits against 100 are 4.8; both
hold three float32 copies at the peak (the log-softmax, and the gradients before and after it), 6.1 GB against 1.3 GB,
and ours holds about 100 MB of the encoder beside them.

Measured then: 4.8 in bfloat16 and 4.7 in float32, 6.13 GB against 1.29 and 1.30 GB: three copies in both, and about
40 MB beside them, because so narrow an encoder keeps less than predicted. Not predicted: a step takes a tenth of the
core seconds, 1.6 against 16 in bfloat16; half of those of the whole run were spent by the system on memory. The losses
differ by 5e-6 in bfloat16 and 3e-8 in float32.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxtral_dist.config import ModelConfig
from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.micro_batch import IGNORED_LABEL, collate, pad_left
from voxtral_dist.engine.loss import LossOfMicroBatch
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.tekken import MAX_VOCAB_SIZE, NUM_SPECIAL_TOKENS
from voxtral_dist.model.weights import load_voxtral

from workloads.command import run
from workloads.peak_memory import added_peak, in_fresh_process
from workloads.speech import write_model

PRECISIONS = ("bfloat16", "float32")
SHORTEST_COMPLETION = 0.6  # of the longest
FLOAT32_BYTES = 4


def measure(folder: Path, is_quick: bool) -> dict[str, Any]:
    """Both losses in both precisions."""
    vocab_size, num_examples, num_target_tokens, num_rounds = (
        (1024, 2, 10, 1) if is_quick else (MAX_VOCAB_SIZE, 8, 100, 3)
    )
    model = str(write_model(folder / "model", vocab_size))
    precisions = PRECISIONS[:1] if is_quick else PRECISIONS
    contenders = {"logits_to_keep": _last_positions, "all_positions": _all_positions}
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {
        precision: {name: [] for name in contenders} for precision in precisions
    }
    for _ in range(num_rounds):
        for precision in precisions:
            for name, contender in contenders.items():
                rows[precision][name].append(
                    in_fresh_process(contender, model, precision, num_examples, num_target_tokens)
                )
    peaks = {
        precision: {name: statistics.median(row["added_peak_bytes"] for row in each) for name, each in by_name.items()}
        for precision, by_name in rows.items()
    }
    ratios = {precision: peak["all_positions"] / peak["logits_to_keep"] for precision, peak in peaks.items()}
    return {
        "ratio": ratios["bfloat16"],
        "ratio_is": "bytes that a step adds at its peak, logits of all positions over logits_to_keep, in bfloat16",
        "ratios": ratios,
        "added_peak_bytes": peaks,
        "computed": {
            name: _computed(num_examples, row["positions_with_logits"], vocab_size)
            for name, [row, *_] in rows["bfloat16"].items()
        },
        "relative_difference_of_losses": {precision: _difference(by_name) for precision, by_name in rows.items()},
        "vocab_size": vocab_size,
        "num_examples": num_examples,
        "num_target_tokens": num_target_tokens,
        "rounds": rows,
    }


def _last_positions(model: str, precision: str, num_examples: int, num_target_tokens: int) -> dict[str, Any]:
    """Our loss of target positions."""
    prompts, voxtral, log_mel = _load(model, precision)
    loss_of = LossOfMicroBatch(log_mel, ModelConfig.model_fields["loss_chunk_tokens"].default)

    def step(examples: list[Example]) -> float:
        loss = loss_of(voxtral, collate(examples, prompts))
        loss.backward()
        return float(loss.detach())

    return _added(step, prompts, num_examples, num_target_tokens) | {"positions_with_logits": num_target_tokens}


def _all_positions(model: str, precision: str, num_examples: int, num_target_tokens: int) -> dict[str, Any]:
    """Hugging Face's loss of the same sequences, with `</s>` and labels."""
    prompts, voxtral, log_mel = _load(model, precision)

    def step(examples: list[Example]) -> float:
        pcm = collate(examples, prompts).pcm
        input_ids, attention_mask = pad_left([(*one.prompt, *one.completion) for one in examples], prompts.pad_id)
        masked = [(*[IGNORED_LABEL] * len(one.prompt), *one.completion) for one in examples]
        labels, _ = pad_left(masked, IGNORED_LABEL)
        features = log_mel(pcm, [one.num_windows for one in examples])
        # Only the loss is kept, as in Hugging Face's trainer.
        loss = voxtral(
            input_ids=input_ids, attention_mask=attention_mask, input_features=features, labels=labels, use_cache=False
        ).loss
        loss.backward()
        return float(loss.detach()) * sum(len(one.completion) for one in examples)

    positions = len(prompts.transcription("en", 1)) + num_target_tokens
    return _added(step, prompts, num_examples, num_target_tokens) | {"positions_with_logits": positions}


def _load(model: str, precision: str) -> tuple[VoxtralPrompts, Any, LogMel]:
    voxtral = load_voxtral(ModelConfig(path=model, precision=precision))
    return VoxtralPrompts.from_pretrained(model), voxtral, LogMel.from_pretrained(model, torch.device("cpu"))


def _added(
    step: Callable[[list[Example]], float], prompts: VoxtralPrompts, num_examples: int, num_target_tokens: int
) -> dict[str, Any]:
    small = _examples(prompts, num_examples=1, num_target_tokens=2)
    large = _examples(prompts, num_examples, num_target_tokens)
    return added_peak(lambda: step(large), warm_up=lambda: step(small))


def _examples(prompts: VoxtralPrompts, num_examples: int, num_target_tokens: int) -> list[Example]:
    """Examples of a window of noise and a transcript of byte tokens; the first is the longest."""
    rng = np.random.default_rng(0)
    pcm = rng.normal(0, 3000, prompts.window_samples).astype(np.int16)
    shortest = round(SHORTEST_COMPLETION * num_target_tokens)
    lengths = [num_target_tokens, *rng.integers(shortest, num_target_tokens + 1, num_examples - 1).tolist()]
    blank = Example(
        utterance_id=0,
        key="",
        pcm=pcm,
        num_windows=1,
        prompt=prompts.transcription("en", 1),
        completion=(),
        reference="",
        duration_seconds=prompts.window_seconds,
    )
    letters = [rng.integers(NUM_SPECIAL_TOKENS, NUM_SPECIAL_TOKENS + 256, length - 1).tolist() for length in lengths]
    return [replace(blank, completion=(*ids, prompts.eos_id)) for ids in letters]


def _computed(num_examples: int, num_positions: int, vocab_size: int) -> dict[str, int]:
    """Bytes of one tensor of the logits' shape; the loss converts bfloat16 to float32."""
    size = num_examples * num_positions * vocab_size
    return {"positions": num_positions, "bfloat16": size * FLOAT32_BYTES // 2, "float32": size * FLOAT32_BYTES}


def _difference(by_name: dict[str, list[dict[str, Any]]]) -> float:
    ours, theirs = (rows[0]["value"] for rows in by_name.values())
    return abs(ours - theirs) / theirs


if __name__ == "__main__":
    run(__doc__, measure, ("ratio", "ratios", "added_peak_bytes", "computed", "relative_difference_of_losses"))

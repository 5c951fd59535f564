"""Memory of the encoder: windows in checkpointed passes of 4 against all windows in one pass.

    python benchmarks/encoder_memory.py --output encoder_memory.json [--quick]

Encoder and projector with 4 layers of width 256 and the published 1,500 positions a window; 4, 16 and 60 windows, as of
half an hour of audio. Each step is forward and backward in a fresh process, in turns: its peak of resident memory over
that before the step, its features included; medians. Beside ours and the plain encoder runs one pass with every layer
checkpointed, transformers' own way to save memory. The gradients of all three are compared by their norm.

`ratio` is the peak of one pass over that of passes at 60 windows.

Predicted before the first run: about 110 MB a window in one pass, 6.6 GB at 60; ours 500 MB at 16 and 600 MB at 60, as
only features (1.5 MB a window) and embeddings (0.4 MB, a few times) are added to one pass of 4. So 1.0, 3.6 and a
`ratio` of 11. With checkpointed layers about 0.5 GB of inputs and one layer's 1.5 GB: 2 GB at 60. Ours costs a third
more time than one pass, as checkpointed layers do.

Measured then: 1.0, 3.6 and a `ratio` of 11.7. One pass takes 122 MB a window, 7.29 GB at 60; ours 488, 535 and 622 MB,
2.4 MB for every window more, of which features and embeddings are 1.9 and the joint of the embeddings the rest.
Checkpointed layers take 0.19, 0.76 and 2.86 GB: more at 60 than predicted, and less than ours at 4, where there is a
single pass and nothing to drop. Ours takes 40 % more core seconds at 16 windows, and 9 % at 60, a single
run, where one pass probably spends time on getting memory. The norms of the gradients agree to 1e-7.
"""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from voxtral_dist.config import ActivationCheckpointingConfig, ModelConfig
from voxtral_dist.model.encoder import ChunkedEncoder
from voxtral_dist.model.tiny import NUM_MEL_BINS, TinyShape, build_tiny_voxtral
from voxtral_dist.model.weights import load_voxtral

from workloads.command import run
from workloads.peak_memory import added_peak, in_fresh_process
from workloads.speech import PROCESSOR_SHAPE

SHAPE = replace(PROCESSOR_SHAPE, encoder_width=256, encoder_layers=4, encoder_heads=4, text_width=256)
FRAMES_PER_POSITION = 2
FLOAT32_BYTES = 4
WINDOWS_PER_CHUNK = 4
# By the number of windows: the longest step takes a minute, and peaks hardly differ from one run to the next.
NUM_ROUNDS = {4: 3, 16: 3, 60: 1}
CONTENDERS = ("passes", "one_pass", "one_pass_checkpointed_layers")


def measure(folder: Path, is_quick: bool) -> dict[str, Any]:
    """All contenders at all numbers of windows."""
    model = folder / "model"
    shape = replace(SHAPE, window_seconds=1.6, encoder_width=64, encoder_layers=2) if is_quick else SHAPE
    build_tiny_voxtral(model, shape)
    num_rounds = {16: 1} if is_quick else NUM_ROUNDS
    contenders = CONTENDERS[:2] if is_quick else CONTENDERS
    rows: dict[str, dict[int, list[dict[str, Any]]]] = {
        name: {num_windows: [] for num_windows in num_rounds} for name in contenders
    }
    for num_windows, count in num_rounds.items():
        for name in contenders * count:
            rows[name][num_windows].append(in_fresh_process(_step, str(model), shape, name, num_windows))
    peaks = {name: _medians(by_number, "added_peak_bytes") for name, by_number in rows.items()}
    fewest, most = min(num_rounds), max(num_rounds)
    return {
        "ratio": peaks["one_pass"][most] / peaks["passes"][most],
        "ratio_is": f"bytes that a step of {most} windows adds, one pass over chunks of {WINDOWS_PER_CHUNK}",
        "ratios": {number: peaks["one_pass"][number] / peaks["passes"][number] for number in num_rounds},
        "added_peak_bytes": peaks,
        "core_seconds": {name: _medians(by_number, "core_seconds") for name, by_number in rows.items()},
        "added_bytes_per_window": {
            name: (peak[most] - peak[fewest]) / max(1, most - fewest) for name, peak in peaks.items()
        },
        "computed_bytes_per_window": _computed(shape),
        "norm_of_gradients": {name: by_number[most][0]["value"] for name, by_number in rows.items()},
        "windows_per_chunk": WINDOWS_PER_CHUNK,
        "rounds": rows,
    }


def _step(model: str, shape: TinyShape, name: str, num_windows: int) -> dict[str, Any]:
    is_checkpointed = name == "one_pass_checkpointed_layers"
    checkpointing = ActivationCheckpointingConfig(encoder=int(is_checkpointed))
    voxtral = load_voxtral(ModelConfig(path=model, precision="float32", activation_checkpointing=checkpointing))
    if name == "passes":
        ChunkedEncoder(voxtral, WINDOWS_PER_CHUNK)

    def step(count: int) -> float:
        voxtral.zero_grad(set_to_none=False)
        features = torch.randn(
            (count, NUM_MEL_BINS, FRAMES_PER_POSITION * shape.num_positions), generator=torch.Generator().manual_seed(0)
        )
        voxtral.model.get_audio_features(features, return_dict=True).pooler_output.square().mean().backward()
        gradients = [parameter.grad for parameter in voxtral.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    return added_peak(lambda: step(num_windows), warm_up=lambda: step(1))


def _computed(shape: TinyShape) -> dict[str, int]:
    """What a window has to keep, whatever the encoder does."""
    return {
        "features": NUM_MEL_BINS * FRAMES_PER_POSITION * shape.num_positions * FLOAT32_BYTES,
        "embeddings": shape.num_audio_tokens * shape.text_width * FLOAT32_BYTES,
    }


def _medians(by_number: dict[int, list[dict[str, Any]]], name: str) -> dict[int, float]:
    return {number: statistics.median(row[name] for row in each) for number, each in by_number.items()}


if __name__ == "__main__":
    run(__doc__, measure, ("ratio", "ratios", "added_peak_bytes", "core_seconds", "added_bytes_per_window"))

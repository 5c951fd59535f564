"""Memory of the encoder: checkpointed chunks of 4 windows against all windows at once.

    python benchmarks/encoder_memory.py --output encoder_memory.json [--quick]

Encoder and projector have 4 layers of width 256 and the published 1,500 positions per window. They run on 4, 16 and 60
windows (half an hour of audio). Each forward and backward pass runs in a fresh process, in turns; results are medians
of the peak resident memory above that before the step, features included. A third contender checkpoints every layer on
all windows at once, which is transformers' way to save memory. The norms of the gradients of all three are compared.

`ratio` is the peak of all windows at once over that of chunks, at 60 windows.

Predicted before the first run: about 110 MB per window at once, 6.6 GB for 60; with chunks 500 MB for 16 and 600 MB for
60, because each window adds only features (1.5 MB) and embeddings (a few times 0.4 MB) to the memory of one chunk. So
ratios of 1.0, 3.6 and 11. With checkpointed layers about 0.5 GB of inputs and 1.5 GB of one layer: 2 GB for 60. Chunks
cost a third more time, as checkpointed layers do.

Measured then: ratios of 1.0, 3.6 and 11.7. All windows at once take 122 MB per window, 7.29 GB for 60. Chunks take 488,
535 and 622 MB: 2.4 MB per window, of which features and embeddings are 1.9 MB and their concatenation is the rest.
Checkpointed layers take 0.19, 0.76 and 2.86 GB: more for 60 than predicted, and less than chunks for 4, where there is
one chunk and nothing to drop. Chunks take 40 % more core seconds for 16 windows, and 9 % for 60 in a single run, where
all windows at once probably spend time on allocating memory. The norms of the gradients agree to 1e-7.
"""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from voxtral_dist.config import ActivationCheckpointingConfig, ModelConfig
from voxtral_dist.model.encoder import ChunkedEncoder
from voxtral_dist.model.tekken import NUM_MEL_BINS
from voxtral_dist.model.tiny import TinyShape, build_tiny_voxtral
from voxtral_dist.model.weights import load_voxtral

from workloads.command import run
from workloads.peak_memory import added_peak, in_fresh_process
from workloads.speech import PROCESSOR_SHAPE

SHAPE = replace(PROCESSOR_SHAPE, encoder_width=256, encoder_layers=4, encoder_heads=4, text_width=256)
FRAMES_PER_POSITION = 2
FLOAT32_BYTES = 4
WINDOWS_PER_CHUNK = 4
# By number of windows. The longest step takes a minute, and peaks hardly differ between runs.
NUM_ROUNDS = {4: 3, 16: 3, 60: 1}
CONTENDERS = ("chunks", "at_once", "at_once_checkpointed_layers")


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
        "ratio": peaks["at_once"][most] / peaks["chunks"][most],
        "ratio_is": f"bytes that a step of {most} windows adds, all at once over chunks of {WINDOWS_PER_CHUNK}",
        "ratios": {number: peaks["at_once"][number] / peaks["chunks"][number] for number in num_rounds},
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
    is_checkpointed = name == "at_once_checkpointed_layers"
    checkpointing = ActivationCheckpointingConfig(encoder=int(is_checkpointed))
    voxtral = load_voxtral(ModelConfig(path=model, precision="float32", activation_checkpointing=checkpointing))
    if name == "chunks":
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
    """Bytes that any encoder must keep of a window."""
    return {
        "features": NUM_MEL_BINS * FRAMES_PER_POSITION * shape.num_positions * FLOAT32_BYTES,
        "embeddings": shape.num_audio_tokens * shape.text_width * FLOAT32_BYTES,
    }


def _medians(by_number: dict[int, list[dict[str, Any]]], name: str) -> dict[int, float]:
    return {number: statistics.median(row[name] for row in each) for number, each in by_number.items()}


if __name__ == "__main__":
    run(__doc__, measure, ("ratio", "ratios", "added_peak_bytes", "core_seconds", "added_bytes_per_window"))

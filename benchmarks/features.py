"""Log-mel features of a batch: ours on int16 windows, against transformers' `WhisperFeatureExtractor` clip by clip.

    python benchmarks/features.py --output features.json [--quick]

Both run in one thread on the same clips, in turns; results are medians. `ratio` is our speed over the extractor's. The
extractor is called clip by clip because `VoxtralProcessor` does so, and because it is slower on batches.

Predicted before the first run: a ratio of about 2, because both spend their time in the same Fourier transform, and
ours saves conversions and Python around it. Measured then: 0.4, because the spectra of a whole batch do not fit into a
CPU's caches, and 1.0 with 30 s of audio at a time. So ours is not faster on a CPU. It is meant for GPUs, where the
features of a batch are one call.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

from voxtral_dist.model.features import LogMel

from workloads.command import run

SAMPLING_RATE = 16_000
WINDOW_SECONDS = 30


def measure(_: Path, is_quick: bool) -> dict[str, object]:
    """CPU seconds of both for the same batch, in turns."""
    torch.set_num_threads(1)
    num_clips, num_rounds = (2, 2) if is_quick else (16, 9)
    extractor = WhisperFeatureExtractor(feature_size=128)
    log_mel = LogMel(extractor, torch.device("cpu"))
    noise = np.random.default_rng(0).normal(0, 0.1, (num_clips, WINDOW_SECONDS * SAMPLING_RATE))
    pcm = torch.from_numpy((noise * 32767).astype(np.int16))
    clips = [window.numpy().astype(np.float32) / 32768 for window in pcm]

    def ours() -> torch.Tensor:
        return log_mel(pcm, [1] * num_clips)

    def theirs() -> torch.Tensor:
        each = [extractor(clip, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features for clip in clips]
        return torch.cat(each)

    difference = float((ours() - theirs()).abs().max())
    seconds: dict[str, list[float]] = {"ours": [], "whisper_feature_extractor": []}
    for _ in range(num_rounds):
        seconds["ours"].append(cpu_seconds(ours))
        seconds["whisper_feature_extractor"].append(cpu_seconds(theirs))
    audio_seconds = num_clips * WINDOW_SECONDS
    speed = {name: audio_seconds / statistics.median(each) for name, each in seconds.items()}
    return {
        "ratio": speed["ours"] / speed["whisper_feature_extractor"],
        "audio_seconds_per_core_second": speed,
        "largest_difference": difference,
        "num_clips": num_clips,
        "cpu_seconds": seconds,
    }


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU seconds of one call, on all threads of this process."""
    started = time.process_time()
    function()
    return time.process_time() - started


if __name__ == "__main__":
    run(__doc__, measure, ("ratio", "audio_seconds_per_core_second"))

"""Batches per core second: our collator against one that does what published Voxtral fine-tuning scripts do.

    python benchmarks/collate.py --output collate.json [--quick]

Both start from decoded audio in memory, with texts and languages, and end with the input of a training step. They take
turns in one process with one thread, on batches of 8 with windows of 30 s and a vocabulary of 131,072; results are
medians of core seconds. The rival is `rivals/transcription_collator.py`. The run fails if tokens, targets or attention
masks differ, or features differ by more than 1e-4.

`ratio` is ours over the rival on utterances as long as LibriSpeech's. Our batch ends with int16 windows, because the
features are computed on the model's device, a GPU in training. The windows are copied once, as for the transfer to the
device: silent windows are memory that the kernel has not mapped yet, which would otherwise be free here and cost
something later. `ratio_with_features` adds our features on the same core, and `ratio_without_features` subtracts those
of the rival.

Predicted before the first run: a `ratio` of 30 (98 ms against 3.2 ms a batch), from `data_path.py` less the time that
libFLAC takes, and 1.6 with features; on short clips 17 and 1.3. The aim was 8.

Measured: 90, and 1.7 with features, which flattered ours: the silence of its windows had not been touched. With the
copy 57 and 1.7, and in a second run, which the documentation quotes, 61 and 1.6 (126 ms against 2.1 ms a batch, of
which the copy is 0.9); on short clips 65 and 1.3. The prediction was too low because it counted the reading of tars as
collating. Features are 75 of the rival's 126 ms; the rest is writing and reading a WAV file, and decoding every prompt
to text that is never used: 25 times ours without features. The features are bit-identical, because both use the same
library for the spectrum.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxtral_dist.data.examples.example import Example
from voxtral_dist.data.examples.micro_batch import MicroBatch, collate
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.tekken import MAX_VOCAB_SIZE

from rivals.transcription_collator import TranscriptionCollator
from workloads.command import run
from workloads.speech import SAMPLING_RATE, Utterance, librispeech_like, short_clips, source, write_model

BATCH_SIZE = 8
LANGUAGE = "en"
INT16_SCALE = 32768
FEATURE_TOLERANCE = 1e-4

# A waveform of 16 kHz and its text.
Decoded = tuple[NDArray[np.float32], str]


class OurPath:
    """Our path from decoded audio to micro-batches, as `voxtral-dist train` makes them."""

    def __init__(self, model: str) -> None:
        self._prompts = VoxtralPrompts.from_pretrained(model)
        self.log_mel = LogMel.from_pretrained(model, torch.device("cpu"))

    def windows(self, utterances: Sequence[Utterance]) -> MicroBatch:
        """Collate as a data worker does: tokens and int16 windows."""
        examples = [self._example(number, utterance) for number, utterance in enumerate(utterances)]
        return collate(examples, self._prompts)

    def copied_windows(self, utterances: Sequence[Utterance]) -> Tensor:
        """The windows, copied once as for the transfer to the device; see the docstring of this module."""
        return self.windows(utterances).pcm.clone()

    def features(self, utterances: Sequence[Utterance]) -> Tensor:
        """The features of the batch, computed as on the model's device."""
        batch = self.windows(utterances)
        return self.log_mel(batch.pcm, batch.windows_per_example)

    def _example(self, number: int, utterance: Utterance) -> Example:
        num_windows = self._prompts.num_windows(len(utterance.pcm))
        return Example(
            utterance_id=number,
            key=str(number),
            pcm=utterance.pcm,
            num_windows=num_windows,
            prompt=self._prompts.transcription(LANGUAGE, num_windows),
            completion=tuple(self._prompts.completion(utterance.text)),
            reference=utterance.text,
            duration_seconds=utterance.seconds,
        )


class TheirPath:
    """The published path from decoded audio to the inputs of Hugging Face's Trainer."""

    def __init__(self, model: str) -> None:
        self.collator = TranscriptionCollator(model)

    def __call__(self, clips: Sequence[Decoded]) -> dict[str, Tensor]:
        """Collate a batch."""
        waveforms, texts = zip(*clips, strict=True)
        return self.collator(waveforms, texts, [LANGUAGE] * len(texts))

    def features(self, clips: Sequence[Decoded]) -> list[Tensor]:
        """Only the features that the processor computes for the batch, clip by clip."""
        extractor = self.collator.processor.feature_extractor
        return [
            extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
            for waveform, _ in clips
        ]


def measure(folder: Path, is_quick: bool) -> dict[str, Any]:
    """Measure all contenders on both distributions of lengths."""
    torch.set_num_threads(1)
    model = str(write_model(folder / "model", 8192 if is_quick else MAX_VOCAB_SIZE))
    num_batches, num_rounds = (1, 1) if is_quick else (8, 7)
    corpora = {"librispeech_like": librispeech_like(num_batches * BATCH_SIZE)}
    if not is_quick:
        corpora["short_clips"] = short_clips(num_batches * BATCH_SIZE)
    ours, theirs = OurPath(model), TheirPath(model)
    results = {name: _compare(ours, theirs, utterances, num_rounds) for name, utterances in corpora.items()}
    ratios = results["librispeech_like"]["ratios"]
    return {
        "ratio": ratios["ratio"],
        "ratio_with_features": ratios["with_features"],
        "ratio_without_features": ratios["without_features"],
        "ratio_is": "batches per core second of ours over the published collator, on librispeech_like",
        "by_length": results,
        "source": source(),
        "batch_size": BATCH_SIZE,
    }


def _compare(ours: OurPath, theirs: TheirPath, utterances: Sequence[Utterance], num_rounds: int) -> dict[str, Any]:
    batches = [utterances[start : start + BATCH_SIZE] for start in range(0, len(utterances), BATCH_SIZE)]
    decoded = [[_decoded(utterance) for utterance in batch] for batch in batches]
    # Also the warm-up: each contender makes its first batch here, untimed.
    difference = max(_difference(ours, theirs, *pair) for pair in zip(batches, decoded, strict=True))
    contenders: dict[str, tuple[Callable[[Any], object], Sequence[Any]]] = {
        "ours": (ours.copied_windows, batches),
        "ours_not_copied": (ours.windows, batches),
        "ours_with_features": (ours.features, batches),
        "published_collator": (theirs, decoded),
        "features_of_published_collator": (theirs.features, decoded),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(num_rounds):
        for name, (function, inputs) in contenders.items():
            seconds[name].append(_core_seconds(function, inputs))
    median = {name: statistics.median(each) for name, each in seconds.items()}
    theirs_alone = median["published_collator"] - median["features_of_published_collator"]
    return {
        "ratios": {
            "ratio": median["published_collator"] / median["ours"],
            "with_features": median["published_collator"] / median["ours_with_features"],
            "without_features": theirs_alone / median["ours"],
        },
        "batches_per_core_second": {name: len(batches) / each for name, each in median.items()},
        "largest_difference_of_features": difference,
        "mean_seconds": statistics.mean(utterance.seconds for utterance in utterances),
        "num_batches": len(batches),
        "core_seconds": seconds,
    }


def _decoded(utterance: Utterance) -> Decoded:
    return utterance.pcm.astype(np.float32) / INT16_SCALE, utterance.text


def _core_seconds(function: Callable[[Any], object], batches: Sequence[Any]) -> float:
    started = time.process_time()
    for batch in batches:
        function(batch)
    return time.process_time() - started


def _difference(ours: OurPath, theirs: TheirPath, utterances: Sequence[Utterance], decoded: Sequence[Decoded]) -> float:
    """The maximum absolute difference of the features.

    Raises:
        RuntimeError: the batches differ, so that their costs cannot be compared.
    """
    batch, other = ours.windows(utterances), theirs(decoded)
    difference = float((ours.log_mel(batch.pcm, batch.windows_per_example) - other["input_features"]).abs().max())
    # Ours omits the final `</s>`, which predicts nothing, and labels each position with the token that it predicts.
    ours = zip(batch.input_ids, batch.labels, batch.positions_per_example, strict=True)
    theirs = zip(other["input_ids"], other["labels"], other["attention_mask"].bool(), strict=True)
    pairs = [
        ((ids[:length], labels[:length]), (other_ids[real][:-1], other_labels[real][1:]))
        for (ids, labels, length), (other_ids, other_labels, real) in zip(ours, theirs, strict=True)
    ]
    is_same = {
        "input_ids": all(torch.equal(one[0], other[0]) for one, other in pairs),
        "labels": all(torch.equal(one[1], other[1]) for one, other in pairs),
        "input_features": difference <= FEATURE_TOLERANCE,
    }
    if not all(is_same.values()):
        raise RuntimeError(f"The batches of the two collators differ. Equal parts: {is_same}.")
    return difference


if __name__ == "__main__":
    run(__doc__, measure, ("ratio", "ratio_with_features", "ratio_without_features", "by_length"))

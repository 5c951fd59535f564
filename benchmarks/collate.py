"""Batches a core second: ours against a collator that does what published Voxtral fine-tuning scripts do.

    python benchmarks/collate.py --output collate.json [--quick]

Both start from decoded audio in memory, with texts and languages, and end with what a training step takes; in one
process, with one thread, batches of 8, window of 30 s, vocabulary of 131,072, in turns; medians of core seconds. The
rival is `rivals/transcription_collator.py`. The run refuses to go on if tokens, targets or attention masks differ, or
features by more than 1e-4.

`ratio` is ours over the rival on utterances as long as LibriSpeech's. Ours ends with int16 windows, because features
are computed on the model's device, a GPU in training. They are copied once, as on the way to the device: silence is
memory that the system has not yet given, and would else cost nothing here and something later.
`ratio_with_features` counts features on the same core, and `ratio_without_features` takes those of the rival from it.

Predicted before the first run: a `ratio` of 30 (98 ms against 3.2 ms a batch), from `data_path.py` less the time that
libFLAC takes, and 1.6 with features; on short clips 17 and 1.3. The aim was 8.

Measured then: 90, and 1.7 with features, which flattered ours: the silence of its windows had not been touched. With
the copy 57 and 1.7, and in a second run, which the figures in the documentation come from, 61 and 1.6 (126 ms against
2.1 ms a batch, of which the copy is 0.9); on short clips 65 and 1.3. The prediction was too
low because much of what it took for our collating is reading tars. Of the rival's 126 ms, features are 75; the rest is
writing and reading a WAV file, and decoding every prompt to text that nobody reads: 25 times ours without features. The
features are the same bits, because the same library makes the spectrum.
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
from voxtral_dist.data.examples.micro_batch import IGNORED_LABEL, MicroBatch, collate
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.model.tiny import MAX_VOCAB_SIZE

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
    """From decoded audio to micro-batches, as `voxtral-dist train` makes them."""

    def __init__(self, model: str) -> None:
        self._prompts = VoxtralPrompts.from_pretrained(model)
        self.log_mel = LogMel.from_pretrained(model, torch.device("cpu"))

    def windows(self, utterances: Sequence[Utterance]) -> MicroBatch:
        """What a data worker delivers: tokens and int16 windows."""
        examples = [self._example(number, utterance) for number, utterance in enumerate(utterances)]
        return collate(examples, self._prompts.pad_id, self._prompts.window_samples)

    def copied_windows(self, utterances: Sequence[Utterance]) -> Tensor:
        """The same, and one copy of the windows, as to the device; see the head of this file."""
        return self.windows(utterances).pcm.clone()

    def features(self, utterances: Sequence[Utterance]) -> Tensor:
        """Tokens and windows, and what the model's device makes of the windows."""
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
    """From decoded audio to the inputs of Hugging Face's trainer."""

    def __init__(self, model: str) -> None:
        self.collator = TranscriptionCollator(model)

    def __call__(self, clips: Sequence[Decoded]) -> dict[str, Tensor]:
        """The collated batch."""
        waveforms, texts = zip(*clips, strict=True)
        return self.collator(waveforms, texts, [LANGUAGE] * len(texts))

    def features(self, clips: Sequence[Decoded]) -> list[Tensor]:
        """What the processor computes for the batch, clip by clip, and nothing else."""
        extractor = self.collator.processor.feature_extractor
        return [
            extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
            for waveform, _ in clips
        ]


def measure(folder: Path, is_quick: bool) -> dict[str, Any]:
    """All contenders on both lengths of utterances."""
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
        "ratio_is": "batches a core second of ours over the published collator, on librispeech_like",
        "by_length": results,
        "source": source(),
        "batch_size": BATCH_SIZE,
    }


def _compare(ours: OurPath, theirs: TheirPath, utterances: Sequence[Utterance], num_rounds: int) -> dict[str, Any]:
    batches = [utterances[start : start + BATCH_SIZE] for start in range(0, len(utterances), BATCH_SIZE)]
    decoded = [[_decoded(utterance) for utterance in batch] for batch in batches]
    # The first batch of each is made here, and not counted.
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
    """How far the features are from each other at most.

    Raises:
        RuntimeError: it is not the same batch, so that there is nothing to compare.
    """
    batch, other = ours.windows(utterances), theirs(decoded)
    difference = float((ours.log_mel(batch.pcm, batch.windows_per_example) - other["input_features"]).abs().max())
    num_kept = batch.labels.shape[1]
    # Ours leaves out the last `</s>`, which predicts nothing, and has labels where they count: of the next tokens.
    is_same = {
        "input_ids": torch.equal(batch.input_ids, other["input_ids"][:, :-1]),
        "attention_mask": torch.equal(batch.attention_mask, other["attention_mask"][:, :-1]),
        "labels": torch.equal(batch.labels, other["labels"][:, -num_kept:]),
        "masked labels": bool((other["labels"][:, :-num_kept] == IGNORED_LABEL).all()),
        "input_features": difference <= FEATURE_TOLERANCE,
    }
    if not all(is_same.values()):
        raise RuntimeError(f"Both must make the same batch, but this is the same: {is_same}.")
    return difference


if __name__ == "__main__":
    run(__doc__, measure, ("ratio", "ratio_with_features", "ratio_without_features", "by_length"))

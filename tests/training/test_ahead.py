"""Micro-batches one ahead on a stream of their own: the order of copies, waits and uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from voxtral_dist.data.examples.micro_batch import MicroBatch, weightless_micro_batch
from voxtral_dist.model.features import LogMel
from voxtral_dist.model.prompts import VoxtralPrompts
from voxtral_dist.training.ahead import MicroBatchesAhead

CPU = torch.device("cpu")


class Streams:
    """Two streams that compute at once and write down what happens, with the stream on which it does."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.current = "computing"


class Stream:
    def __init__(self, log: Streams, name: str) -> None:
        self.log, self.name = log, name

    def __enter__(self) -> None:
        self.log.current = self.name

    def __exit__(self, *_: Any) -> None:
        self.log.current = "computing"

    def record_event(self) -> int:
        number = sum(call.startswith("record") for call in self.log.calls)
        self.log.calls.append(f"record {number} on {self.name}")
        return number

    def wait_event(self, event: int) -> None:
        self.log.calls.append(f"{self.name} waits for {event}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """A GPU that the code sees: a tensor of it is one on the CPU."""
    log = Streams()

    def copy(batch: MicroBatch, device: torch.device) -> MicroBatch:
        log.calls.append(f"copy {batch.num_utterances} on {log.current}")
        return replace(batch, input_ids=batch.input_ids.clone())

    def keep(tensor: Tensor, stream: Stream) -> None:
        log.calls.append(f"keep for {stream.name}")

    monkeypatch.setattr(torch, "Stream", lambda device: Stream(log, "ahead"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Stream(log, log.current))
    monkeypatch.setattr(MicroBatch, "to", copy)
    monkeypatch.setattr(Tensor, "record_stream", keep)
    return log


def batches_of(prompts: VoxtralPrompts, count: int) -> list[MicroBatch]:
    """Micro-batches that differ in what they say of their number of utterances."""
    return [replace(weightless_micro_batch(prompts), num_utterances=number) for number in range(count)]


def test_a_micro_batch_is_begun_before_the_one_ahead_is_used(
    prompts: VoxtralPrompts, tiny_model: Path, streams: Streams
) -> None:
    log_mel = LogMel.from_pretrained(str(tiny_model), CPU)

    def logged(*arguments: Any) -> Tensor:
        streams.calls.append(f"features on {streams.current}")
        return log_mel(*arguments)

    ahead = MicroBatchesAhead(logged, torch.device("cuda", 0))  # type: ignore[arg-type]
    for batch in ahead(batches_of(prompts, 3)):
        streams.calls.append(f"use {batch.num_utterances} on {streams.current}")
        assert batch.features is not None
        torch.testing.assert_close(batch.features, log_mel(batch.pcm, batch.windows_per_example))
    begun = [[f"copy {number} on ahead", "features on ahead", f"record {number} on ahead"] for number in range(3)]
    # Seven tensors were made on the other stream.
    used = [
        [f"computing waits for {number}", *7 * ["keep for computing"], f"use {number} on computing"]
        for number in range(3)
    ]
    assert streams.calls == [*begun[0], *begun[1], *used[0], *begun[2], *used[1], *used[2]]


def test_on_the_cpu_there_are_no_streams_and_no_features_ahead(prompts: VoxtralPrompts, tiny_model: Path) -> None:
    ahead = MicroBatchesAhead(LogMel.from_pretrained(str(tiny_model), CPU), CPU)
    given = batches_of(prompts, 3)
    found = list(ahead(given))
    assert [batch.num_utterances for batch in found] == [0, 1, 2]
    assert all(batch.features is None for batch in found)
    assert all(one.pcm is other.pcm for one, other in zip(found, given, strict=True))

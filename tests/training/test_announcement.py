"""What a run says of its batch size and its epochs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from voxtral_dist.training.announcement import batch_line, data_lines


def loader(num_steps: int, steps_per_epoch: int, utterances_of_micro_batch: float = 7.9) -> Any:
    statistics = SimpleNamespace(num_utterances=utterances_of_micro_batch)
    plan = SimpleNamespace(statistics=statistics, steps_per_epoch=steps_per_epoch)
    return SimpleNamespace(training_set=SimpleNamespace(plan=plan, lines=lambda: iter(())), num_steps=num_steps)


@pytest.mark.parametrize(
    ("num_slots", "num_ranks", "sentence"),
    [
        (32, 8, "about 253 utterances a step, 7.9 in a micro-batch x 4 accumulated x 8 ranks"),
        (1, 1, "about 8 utterances a step, 7.9 in a micro-batch x 1 accumulated x 1 rank "),
        (6, 4, "7.9 in a micro-batch x 1 or 2 accumulated x 4 ranks"),
    ],
)
def test_slots_are_said_as_a_batch_size(num_slots, num_ranks, sentence):
    line = batch_line(num_slots, loader(1, 1).training_set, num_ranks)
    assert sentence in line
    assert line.endswith(f"(`train_data.slots_per_step: {num_slots}`)")


def test_many_epochs_are_warned_of():
    config: Any = SimpleNamespace(train_data=SimpleNamespace(slots_per_step=2))
    assert [line for line in data_lines(config, loader(200, 10), 1) if "Warning" in line] == []
    (warning,) = [line for line in data_lines(config, loader(350, 10), 1) if "Warning" in line]
    assert warning.startswith("Warning: 35 epochs, more than 20: ")

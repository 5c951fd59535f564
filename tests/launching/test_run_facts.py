"""How long a stopped run may take."""

import json

import pytest

from voxtral_dist.launching.run_facts import grace_seconds, measured_save_seconds


def test_the_longest_measured_save_counts(tmp_path):
    assert measured_save_seconds(tmp_path) is None
    rows = [
        {"kind": "train", "step": 1, "seconds": 500.0},
        {"kind": "checkpoint", "step": 1, "seconds": 31.5},
        {"kind": "checkpoint", "step": 2, "seconds": 90},
        {"kind": "checkpoint", "step": 3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "check\n')
    assert measured_save_seconds(tmp_path) == 90


@pytest.mark.parametrize(("save", "uploads", "grace"), [(65, False, 300), (65, True, 480), (0.5, False, 120)])
def test_a_stopped_run_may_finish_its_step_and_save(save, uploads, grace):
    assert grace_seconds(save, uploads=uploads) == grace

"""The line or bar of a running training."""

from __future__ import annotations

from dataclasses import replace

from voxtral_dist.config import GuardConfig, SelectionConfig
from voxtral_dist.training.display import TrainDisplay
from voxtral_dist.training.step_metrics import StepMetrics

METRICS = StepMetrics(
    loss=1.25,
    num_target_tokens=100,
    num_tokens=1000,
    audio_seconds=30.0,
    model_flops=1e12,
    learning_rate=2.5e-5,
    grad_norm=1.0,
    step_seconds=2.0,
    waiting_seconds=0.0,
    memory_gigabytes=12.5,
)


def test_it_shows_the_learning_rate_and_the_last_error_rates_of_the_first_test_sets(capsys):
    display = TrainDisplay(num_steps=2, first_step=0, peak_flops=None)
    display.show(1, METRICS)
    for name, wer in (("fr", 0.981), ("zh", None), ("de", 0.5), ("fr", 0.432)):
        values = {"num_utterances": 2, "num_without_spaces": 2, "cer": 0.25} if name == "zh" else {}
        display.evaluated({"name": name, "wer": wer, **values})
    display.show(2, replace(METRICS, loss=None))
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/2  loss 1.250  lr 2.5e-05  15 audio s/s  12.5 GB")
    assert last.startswith("step 2/2  loss -  lr 2.5e-05  fr WER 43.2 %  zh CER 25.0 %  15 audio s/s")


def test_it_shows_the_rate_by_which_checkpoints_are_selected(capsys):
    guard = GuardConfig(test_set="general")
    selection = SelectionConfig(test_set="dev", metric="cer", guard=guard)
    display = TrainDisplay(num_steps=1, first_step=0, peak_flops=None, selection=selection)
    for name in ("dev", "general"):
        display.evaluated({"name": name, "wer": 0.5, "cer": 0.25, "num_utterances": 2})
    display.show(1, METRICS)
    assert "dev CER 25.0 %  general WER 50.0 %" in capsys.readouterr().out

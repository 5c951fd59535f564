"""What the end of a run says of its error rates."""

from __future__ import annotations

from typing import Any

from voxtral_dist.training.outcome import outcome_lines, telling_rate
from voxtral_dist.training.selection import Verdict


def row(name: str, step: int, wer: float | None, **values: Any) -> dict[str, Any]:
    return {"name": name, "step": step, "wer": wer, "num_utterances": 10, **values}


def said(rows: list[dict[str, Any]], run_dir, verdict: Verdict | None = None, step: int = 20) -> list[str]:
    return list(outcome_lines(rows, verdict or Verdict(), step, run_dir))


def test_each_test_set_has_its_rate_before_and_after(tmp_path):
    rows = [row("fr", 0, 0.981), row("de", 0, 0.5), row("es", 0, 0.25), row("fr", 10, 0.9), row("fr", 20, 0.992)]
    rows += [row("de", 20, 0.25), row("es", 20, 0.25), row("it", 20, 0.125)]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "report.html").touch()
    rates = [
        "fr WER 98.10 -> 99.20 % (worse than the start)",
        "de WER 50.00 -> 25.00 % (25.0 points better)",
        "es WER 25.00 % (as at the start)",
        "it WER 12.50 %",
    ]
    places = [f"report {tmp_path / 'report.html'}", f"adapter {tmp_path / 'adapter'}"]
    assert said(rows, tmp_path) == [f"Result of step 20: {', '.join([*rates, *places])}"]
    # The rates are those of the weights that were exported.
    assert said(rows, tmp_path, step=10)[0].startswith(
        "Result of step 10: fr WER 98.10 -> 90.00 % (8.1 points better), "
    )


def test_a_best_checkpoint_that_is_worse_than_the_initial_model_is_said_to_be(tmp_path):
    rows = [row("dev", 0, 0.4), row("dev", 10, 0.5), row("dev", 20, 0.6)]
    verdict = Verdict(best_step=10, best_rate=0.5, test_set="dev")
    _, worse = said(rows, tmp_path, verdict, step=10)
    assert worse.startswith(
        "The best checkpoint, of step 10, is worse than the model that the run began with: WER 50.00 % instead of "
        "40.00 % on `dev`."
    )
    assert len(said(rows, tmp_path, Verdict(best_step=10, best_rate=0.4, test_set="dev"))) == 1
    # Another metric, and no measurement at the start.
    by_cer = Verdict(best_step=10, best_rate=0.3, metric="cer", test_set="dev")
    assert len(said([one | {"cer": 0.2} for one in rows], tmp_path, by_cer)) == 2
    assert len(said(rows[1:], tmp_path, verdict)) == 1


def test_languages_without_spaces_are_told_by_cer(tmp_path):
    values = {"num_without_spaces": 6, "cer": 0.25}
    assert telling_rate(row("zh", 0, 1.0, **values)) == "cer"
    assert said([row("zh", 20, 1.0, **values)], tmp_path) == ["Result of step 20: zh CER 25.00 %"]
    # A set by whose CER checkpoints are selected is told by it.
    selected = Verdict(best_step=20, best_rate=0.25, metric="cer", test_set="dev")
    assert said([row("dev", 20, 0.5, cer=0.25)], tmp_path, selected) == ["Result of step 20: dev CER 25.00 %"]
    assert said([row("empty", 20, None)], tmp_path) == []
    assert said([], tmp_path) == []

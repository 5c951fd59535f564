"""The page says first whether the model became better, how certain that is, and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from voxtral_dist.reporting.outcomes import Outcome, outcome_of, summary_of
from voxtral_dist.reporting.results_folder import ReportOptions
from voxtral_dist.reporting.writing import write_report
from voxtral_dist.scoring.comparison import MIN_MATCHED_PAIRS
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.results import percent, score_test_set
from voxtral_dist.scoring.utterances import ScoredUtterance

from saved_results import BASIC, Element, parse, score_of, select_by_cer, utterance, write_run, write_set


def numbered(hypotheses: Sequence[str], reference: str = "a b c d", **chosen: object) -> list[ScoredUtterance]:
    return [utterance(number, reference, text, **chosen) for number, text in enumerate(hypotheses)]


def outcome(before: Sequence[ScoredUtterance], after: Sequence[ScoredUtterance], against: str = "the start") -> Outcome:
    results = score_test_set(before, BASIC), score_test_set(after, BASIC)
    return outcome_of(against, results, list(zip(before, after, strict=True)), Grouping(), results[1].deciding_rate())


BAD, GOOD = numbered(["a b x"] * 40), numbered(["a b c d"] * 20 + ["a b x"] * 20)


@pytest.mark.parametrize(
    ("before", "after", "judgement", "said"),
    [
        (BAD, GOOD, "better", "significantly better"),
        (GOOD, BAD, "worse", "significantly worse"),
        (BAD, BAD, "undecided", "no significant difference"),
        (GOOD, numbered(["a b x"] + ["a b c d"] * 20 + ["a b x"] * 19), "undecided", "no significant difference"),
        (BAD[: MIN_MATCHED_PAIRS - 1], GOOD[: MIN_MATCHED_PAIRS - 1], "undecided", "too few utterances to be certain"),
        (BAD[:1], GOOD[:1], "undecided", "too few utterances to be certain"),
    ],
)
def test_a_difference_counts_where_its_interval_excludes_zero(before, after, judgement, said):
    found = outcome(before, after)
    assert (found.judgement, found.said, found.metric) == (judgement, said, "wer")


def test_languages_without_spaces_are_judged_by_characters():
    before, after = (numbered([text] * 40, "今天天氣很好", language="zh") for text in ("今天", "今天天氣"))
    found = outcome(before, after)
    assert (found.metric, found.before, found.after) == ("cer", pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (found.judgement, found.num_better, found.num_worse) == ("better", 40, 0)
    assert found.after_interval == found.later.normalized.cer_interval


def test_a_run_that_selects_by_characters_is_judged_by_them_everywhere(tmp_path, shard_folder):
    run = write_run(tmp_path / "run", shard_folder)
    words = "one two three four"
    # By words step 4 is the better one, by characters step 8.
    texts = {0: "x x x x", 4: "one two three abcdefghijk", 8: "one two thre fou"}
    for step, text in texts.items():
        write_set(run / "evaluations" / f"step-{step:07d}", "speech", numbered([text] * 40, words))
    page = page_of(run, tmp_path, step="best")
    assert "Utterances with the highest WER" in page.text
    assert "- Step: 4, of 3 evaluated steps" in (tmp_path / "report.md").read_text()
    select_by_cer(run)
    baseline = write_set(tmp_path / "baseline", "speech", numbered([texts[4], *[texts[8]] * 39], words))
    page = page_of(run, tmp_path, step="best", baseline=baseline)
    markdown = (tmp_path / "report.md").read_text()
    assert "- Step: 8, of 3 evaluated steps" in markdown
    assert "- speech: CER " in markdown
    assert [one.text[:4] for one in verdict_of(page).all("p", "change")] == ["CER ", "CER ", "WER "]
    section = next(one for one in page.all("section") if one.attributes["id"] == "set-1")
    assert "Utterances with the most errors in characters" in section.text
    assert "Utterances with the highest CER" in section.text
    assert [button.text for button in section.all("table", "sortable")[0].all("button")][1:3] == ["CER", "WER"]
    # More words are wrong than before, but fewer characters.
    better = section.all("ol", "cards")[-1]
    assert better.all("bdi", "utterance-key")[0].text == "key-0"
    assert "Worse than the baseline" not in section.text
    assert "has a lower" not in verdict_of(page).text
    assert any(flag.startswith("step 8 has a lower CER on speech") for flag in flags_in(page_of(run, tmp_path, step=4)))


def test_all_test_sets_are_summed_up():
    better, worse, same = outcome(BAD, GOOD), outcome(GOOD, BAD), outcome(BAD, BAD)
    assert summary_of([]) == ""
    assert summary_of([worse]) == "Worse than the start."
    assert summary_of([same]) == "Not known to be better or worse than the start: no significant difference."
    assert summary_of([better, better]) == "Better than the start on 2 of 2 test sets."
    assert summary_of([better, worse, same]) == (
        "Better than the start on 1, worse than the start on 1, not certainly different from the start on 1 of 3 test "
        "sets."
    )


def page_of(folder: Path, out: Path, **chosen: object) -> Element:
    return parse(write_report(folder, ReportOptions(**chosen), out)[0])


def verdict_of(page: Element) -> Element:
    (section,) = (one for one in page.all("section") if one.attributes["id"] == "verdict")
    return section


def test_the_verdict_is_first_and_has_before_after_and_the_difference(run, tmp_path):
    page = page_of(run, tmp_path)
    text = page.text
    assert text.index("too few utterances to be certain") < text.index("Seed") < text.index("Error rates")
    verdict = verdict_of(page)
    sets = verdict.all("ul", "outcomes")[0].all("h2")
    assert [one.text for one in sets] == ["speech", "again"]
    before, after = (score_of(run / "evaluations" / f"step-000000{step}", "speech") for step in (0, 8))
    change = verdict.all("p", "change")[0].text
    assert change.startswith(f"WER {percent(before['wer'])} → {percent(after['wer'])}")
    difference = 100 * (after["wer"] - before["wer"])
    assert f"against the start: {difference:+.2f} points [" in verdict.all("p", "caption")[0].text
    markdown = (tmp_path / "report.md").read_text()
    line = (
        f"- speech: WER {percent(before['wer'])} → {percent(after['wer'])}, against the start {difference:+.2f} points"
    )
    assert line in markdown.partition("## ")[0]


def test_a_baseline_has_a_verdict_beside_that_of_the_start(run, tmp_path, shard_folder):
    baseline = write_run(tmp_path / "before", shard_folder, wrong_words=(4, 0))
    verdict = verdict_of(page_of(run, tmp_path, baseline=baseline))
    assert len(verdict.all("p", "verdict")) == 2
    against = [caption.text.partition(":")[0] for caption in verdict.all("p", "caption")]
    assert against == [*["against the start", "against the baseline"] * 2, "Significant"]
    # The start of the baseline is of no interest: it alone has no verdict with it.
    only = write_set(tmp_path / "only", "speech", numbered(["a b"] * 40))
    better = write_set(tmp_path / "better", "speech", numbered(["a b c d"] * 40))
    compared = page_of(better, tmp_path, baseline=only)
    assert verdict_of(compared).all("p", "verdict")[0].text == "Better than the baseline."
    (shown,) = verdict_of(compared).all("div", "outcome")
    assert "better" in shown.classes
    (shown,) = verdict_of(page_of(better, tmp_path)).all("div", "outcome")
    assert "not compared with anything" in shown.text


def test_a_start_that_was_measured_otherwise_has_no_verdict(tmp_path, shard_folder):
    run = write_run(tmp_path / "run", shard_folder)
    start = run / "evaluations" / "step-0000000"
    (start / "speech.json").write_text((start / "speech.json").read_text().replace('"basic-3"', '"none-1"'))
    lines = (start / "again.jsonl").read_text().splitlines(keepends=True)
    (start / "again.jsonl").write_text("".join(lines[1:]))
    verdict = verdict_of(page_of(run, tmp_path))
    assert not verdict.all("p", "verdict")
    assert verdict.text.count("not compared with anything") == 2


def flags_in(page: Element) -> list[str]:
    return [flag.text.removeprefix("⚑ ") for found in page.all("ul", "flags") for flag in found.all("li")]


def test_red_flags_count_what_went_wrong_beside_what_went_wrong_before(tmp_path):
    loops = numbered(["b " * 50] * 3, hit_limit=True) + numbered(["a b c d"] * 37)
    named = [
        replace(one, decoded=replace(one.decoded, asks_for_language=True, detected_language=found))
        for one, found in zip(loops, ["en"] * 36 + ["de", "fr", None, None], strict=True)
    ]
    named[-1] = replace(named[-1], decoded=replace(named[-1].decoded, hypothesis=""))
    keyed = [replace(one, decoded=replace(one.decoded, key=f"key-{place}")) for place, one in enumerate(named)]
    before = [utterance(place, "a b c d", "a b c d", key=f"key-{place}") for place in range(40)]
    page = page_of(
        write_set(tmp_path / "after", "speech", keyed),
        tmp_path,
        baseline=write_set(tmp_path / "before", "speech", before),
    )
    assert flags_in(page) == [
        "repetition loops: 3 of 40 (7.50 %), 0 in the baseline",
        "hypotheses cut at the token limit: 3 of 40 (7.50 %), 0 in the baseline",
        "empty hypotheses: 1 of 40 (2.50 %), 0 in the baseline",
        "languages detected wrong: 4 of 40 (10.00 %), 0 in the baseline",
    ]
    # 150 insertions and more errors than words, in three of 40 utterances, are worse without being significant.
    worst = write_set(tmp_path / "worst", "speech", numbered(["x y z x y z q r s"] * 40))
    worse = page_of(worst, tmp_path, baseline=write_set(tmp_path / "good", "speech", numbered(["a b c d"] * 40)))
    assert flags_in(worse) == ["worse than the baseline", "more errors than words"]
    clean = page_of(write_set(tmp_path / "clean", "speech", before), tmp_path)
    assert not flags_in(clean)


def test_flags_of_a_run_are_its_losses_and_a_better_step(tmp_path, shard_folder):
    run = write_run(tmp_path / "run", shard_folder, wrong_words=(3, 0, 1))
    losses = {"num_bad_utterances": 3, "num_too_long": 0, "num_skipped_updates": 12, "train_seconds": 7500.4}
    (run / "summary.json").write_text(json.dumps(losses))
    flags = flags_in(page_of(run, tmp_path))
    assert flags[:2] == [
        "bad utterances left out while training: 3",
        "updates skipped, because their loss or gradient was out of bounds: 12",
    ]
    assert flags[2].startswith("step 4 has a lower WER on speech than the step shown: 0.00 % instead of ")
    assert len(flags) == 3
    assert len(flags_in(page_of(run, tmp_path, step=4))) == 2
    assert (tmp_path / "report.md").read_text().count("⚠") == 2


def test_facts_say_what_was_trained_on_what_when_and_by_what(tmp_path, shard_folder):
    run = write_run(tmp_path / "run", shard_folder)
    start = {
        "kind": "event",
        "step": 0,
        "event": "started",
        "world_size": 2,
        "num_utterances": 5000,
        "num_epochs": 2.5,
        "skipped": {"longer than `max_duration_seconds`": 12},
        "engine": "FSDP2",
        "device": "NVIDIA H100",
        "versions": {"voxtral-dist": "0.1.0", "torch": "2.13.0"},
        "audio_seconds": {"de": 36_000.0, "en": 7200.0},
        "started_at": "2026-11-30T03:04:05+00:00",
    }
    rows = (run / "metrics.jsonl").read_text()
    resumed = start | {"event": "resumed", "step": 4, "started_at": "2026-12-01T00:00:00+00:00"}
    (run / "metrics.jsonl").write_text(f"{json.dumps(start)}\n{rows}{json.dumps(resumed)}\n")
    (run / "summary.json").write_text(json.dumps({"engine": "FSDP2", "world_size": 2, "train_seconds": 7500.4}))
    page = page_of(run, tmp_path)
    facts = {one.all("dt")[0].text: one.all("dd")[0].text for one in page.all("dl", "facts")[0].all("div")}
    assert facts == {
        "Step": "8, of 3 evaluated steps",
        "Model": "model",
        "Trained": "all",
        "Precision": "float32",
        "Length of the run": "8 steps",
        "Learning rate": facts["Learning rate"],
        "Seed": facts["Seed"],
        "Training audio": "12.00 h: de 10.00 h, en 2.00 h",
        "Utterances": "4,988, 12 others skipped",
        "Epochs": "2.5",
        "Started": "2026-11-30 03:04 UTC, resumed 1 time",
        "Versions": "voxtral-dist 0.1.0, torch 2.13.0",
        "Time of training": "2 h 05 min",
        "Engine": "FSDP2",
        "Ranks": "2 × NVIDIA H100",
    }
    assert facts["Seed"].isdecimal()


def test_wide_tables_stand_in_boxes_that_show_that_they_scroll(run, tmp_path):
    page = page_of(run, tmp_path)
    boxes = page.all("div", "wide")
    assert all(len(box.all("table")) == 1 for box in boxes)
    inside = sum(len(box.all("table")) for box in boxes)
    assert inside == len([table for table in page.all("table") if not table.all("caption")])

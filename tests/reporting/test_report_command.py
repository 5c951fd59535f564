"""`voxtral-dist report` as users run it: on runs and bare folders, without torch, with one message per error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from voxtral_dist.scoring.results import percent
from voxtral_dist.scoring.tables import format_audio, format_interval

from commands import Result, run_command
from saved_results import parse, score_of, utterance, write_run, write_set


@pytest.fixture
def report(capsys) -> Callable[..., Result]:
    """Runs the command in this process."""

    def run(*arguments: object) -> Result:
        return run_command(capsys, "report", *arguments)

    return run


@pytest.fixture
def refusal(report) -> Callable[..., str]:
    """The message of a refused command, which prints nothing else."""

    def run(*arguments: object) -> str:
        return report(*arguments).refusal()

    return run


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "before", shard_folder, wrong_words=(4, 3))


def test_both_files_are_written_and_named(report, tmp_path):
    folder = write_set(tmp_path / "results", "speech", [utterance(0, "a b", "a")])
    result = report(folder)
    assert result.code == 0, result
    assert result.out.splitlines() == [str(folder / "report.html"), str(folder / "report.md")]
    out = tmp_path / "a" / "b"
    assert report(folder, "--out", out).out.splitlines() == [str(out / "report.html"), str(out / "report.md")]
    for name in ("report.html", "report.md"):
        assert (out / name).read_bytes() == (folder / name).read_bytes(), "the same results give the same files"


def cells_of(markdown: str, first: str) -> list[list[str]]:
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0] == first]


def test_figures_are_those_of_the_score(report, run, tmp_path):
    report(run, "--out", tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    score = score_of(run / "evaluations" / "step-0000008", "again")
    words = score["words"]
    rates = [
        percent(score["wer"]),
        format_interval(score["wer_interval"]),
        percent(score["cer"]),
        percent(score["orthographic"]["wer"]),
        *map(str, (words["substitutions"], words["deletions"], words["insertions"], words["reference_length"])),
        str(score["num_utterances"]),
        format_audio(score["audio_seconds"]),
    ]
    more = map(percent, (score["orthographic"]["cer"], score["mer"], score["wil"], score["punctuation"]["per"]))
    others = [*more, "0", "0", "0", "0", "19.5", "0.5000", "1.649"]
    assert words["substitutions"] > 0
    assert cells_of(markdown, "again") == [["again", *rates], ["again", *others]]
    german = score["slices"]["language"]["de"]
    assert cells_of(markdown, "de †")[0][1:3] == [percent(german["wer"]), format_interval(german["wer_interval"])]
    steps = [score_of(run / "evaluations" / f"step-000000{step}", "speech") for step in (0, 4, 8)]
    assert [cells_of(markdown, str(step))[0][2] for step in (0, 4, 8)] == [percent(one["wer"]) for one in steps]
    # The page has the same rows.
    page = parse(tmp_path / "report.html")
    rows = [[cell.text for cell in row.all() if cell.tag in ("th", "td")] for row in page.all("tr")]
    assert ["again", *rates, "basic-3"] in rows
    assert ["again", *others] in rows
    assert "normalizer basic-3, interval over speakers" in page.text


@pytest.mark.parametrize(("step", "chosen"), [("newest", "8"), ("4", "4"), ("0", "0")])
def test_the_step_is_chosen(report, run, tmp_path, step, chosen):
    report(run, "--step", step, "--out", tmp_path)
    assert f"- Step: {chosen}, of 3 evaluated steps" in (tmp_path / "report.md").read_text()


def test_steps_of_an_attempt_that_began_again_are_not_shown(report, run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    shutil.copytree(run / "evaluations" / "step-0000008", run / "evaluations" / "step-0000012")
    report(run)
    assert "- Step: 8, of 3 evaluated steps" in (run / "report.md").read_text()
    rows = [json.dumps({"kind": "train", "step": 1, "loss": 2.0})]
    (run / "metrics.jsonl").write_text("\n".join([*rows, ""]))
    report(run)
    assert "The run has not evaluated any test set." in parse(run / "report.html").text
    # Without a record of what was evaluated, all are shown.
    (run / "metrics.jsonl").unlink()
    report(run)
    assert "- Step: 12, of 4 evaluated steps" in (run / "report.md").read_text()


def test_the_best_step_is_that_of_the_lowest_wer_of_the_first_set(report, shard_folder, tmp_path):
    run = write_run(tmp_path / "forgetful", shard_folder, wrong_words=(3, 1, 2))
    report(run, "--step", "best", "--out", tmp_path)
    assert "- Step: 4, of 3 evaluated steps" in (tmp_path / "report.md").read_text()
    # What the run selected itself goes before: it looked at a guard too.
    (run / "best.json").write_text(json.dumps({"step": 8, "wer": 0.2, "checkpoint": "checkpoints/step-0000008"}))
    report(run, "--step", "best", "--out", tmp_path)
    assert "- Step: 8, of 3 evaluated steps" in (tmp_path / "report.md").read_text()


def test_what_score_writes_is_enough(report, capsys, tmp_path, shard_folder, run):
    hypotheses = run / "evaluations" / "step-0000008" / "speech.jsonl"
    assert run_command(capsys, "score", hypotheses, "--normalizer", "none", "--out", tmp_path / "scored").code == 0
    assert report(tmp_path / "scored").code == 0
    page = parse(tmp_path / "scored" / "report.html")
    assert "normalizer none-1" in page.text
    assert "the location of its shards is unknown: add --shards speech=FOLDER" in page.text
    assert not page.all("figure")
    assert report(tmp_path / "scored", "--shards", f"speech={shard_folder}", "--num-clips", 2).code == 0
    assert len(parse(tmp_path / "scored" / "report.html").all("audio")) == 2


def test_a_run_is_compared_with_its_baseline(report, run, baseline, tmp_path):
    assert report(run, "--baseline", baseline, "--out", tmp_path).code == 0
    after, before = (
        score_of(folder / "evaluations" / step, "speech")
        for folder, step in ((run, "step-0000008"), (baseline, "step-0000004"))
    )
    difference = 100 * (after["wer"] - before["wer"])
    assert difference < 0
    verdict = (tmp_path / "report.md").read_text().partition("## ")[0]
    rates = f"- speech: WER {percent(before['wer'])} → {percent(after['wer'])}"
    line = next(line for line in verdict.splitlines() if line.startswith(rates) and "baseline" in line)
    assert f"against the baseline {difference:+.2f} points [" in line
    # Of each five utterances, the third to fifth had more words wrong before; below 30 there is no p-value.
    assert "15 of 26 utterances better, 0 worse" in line
    assert "p =" not in line
    page = parse(tmp_path / "report.html")
    better = [card for card in page.all("li") if card.all("div", "versions")]
    assert len(better) == 2 * 15
    first = better[0]
    assert "-2 errors" in first.text
    was, now = (words.all("ins") for words in first.all("p", "words"))
    assert len(was) == len(now) + 2


def test_a_folder_of_results_is_a_baseline_too(report, run, tmp_path):
    folder = tmp_path / "before"
    folder.mkdir()
    for suffix in ("json", "jsonl"):
        stored = run / "evaluations" / "step-0000000" / f"speech.{suffix}"
        (folder / stored.name).write_bytes(stored.read_bytes())
    assert report(run, "--baseline", folder, "--out", tmp_path).code == 0
    page = parse(tmp_path / "report.html")
    assert "The baseline has no results of again." in page.text
    assert [heading.text for heading in page.all("h3")].count("Against the baseline") == 1


def test_speakers_of_a_comparison_are_those_of_either_side(report, capsys, tmp_path):
    rows = [
        {"reference": "a b c", "hypothesis": text, "key": str(number), "spk": str(number)}
        for number, text in enumerate(("a b c", "a", "b c") * 10)
    ]
    for name, options in (("after", ["--speaker-field", "spk"]), ("before", [])):
        (tmp_path / name).mkdir()
        lines = tmp_path / name / "s.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert run_command(capsys, "score", lines, *options, "--out", tmp_path / f"{name}-scored").code == 0
    # The field needs not be told again: the score has it.
    assert report(tmp_path / "after-scored", "--baseline", tmp_path / "before-scored").code == 0
    page = parse(tmp_path / "after-scored" / "report.html").text
    assert "resamples speakers" in page
    assert "resamples utterances" not in page
    assert f"Baseline{tmp_path / 'before-scored'}" in page


def test_runs_that_evaluated_nothing_have_curves(report, run, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n')
    (tmp_path / "summary.json").write_text(json.dumps({"engine": "ZeRO-3", "world_size": 4}))
    assert report(tmp_path).code == 0
    page = parse(tmp_path / "report.html")
    assert "The run has not evaluated any test set." in page.text
    assert "config.yaml cannot be read: No such file or directory." in page.text
    assert len(page.all("figure")) == 1
    assert "- Engine: ZeRO-3\n- Ranks: 4" in (tmp_path / "report.md").read_text()


def test_another_version_of_the_normalizer_is_told(report, tmp_path):
    folder = write_set(tmp_path, "speech", [utterance(0, "a b", "a")])
    score = (folder / "speech.json").read_text()
    (folder / "speech.json").write_text(score.replace('"basic-3"', '"basic-0"'))
    assert report(folder).code == 0
    assert "The installed version of the normalizer differs from basic-0" in parse(folder / "report.html").text


def test_mistakes_are_one_sentence(refusal, run, tmp_path):
    assert "holds no results: name a run, or a folder with" in refusal(tmp_path)
    assert "holds no results" in refusal(tmp_path / "nowhere")
    assert "has not evaluated step 5, only 0, 4, 8." in refusal(run, "--step", 5)
    bare = run / "evaluations" / "step-0000008"
    assert "is a folder of results without steps, not a run" in refusal(bare, "--step", "best")
    assert "there are no results of a test set `other`; known test sets: speech, again." in refusal(
        run, "--shards", "other=x"
    )
    assert "nowhere" in refusal(run, "--shards", f"speech={tmp_path / 'nowhere'}")
    (tmp_path / "file").touch()
    assert "The report cannot be written to" in refusal(run, "--out", tmp_path / "file")
    assert not list(tmp_path.glob("report.*"))


def test_a_baseline_that_does_not_fit_is_refused(refusal, run, tmp_path):
    other = [utterance(number, "a b", "a b", key=f"other-{number}") for number in range(3)]
    assert "do not hold the same utterances (29 keys in only one of them" in refusal(
        run, "--baseline", write_set(tmp_path / "other", "speech", other), "--out", tmp_path / "out"
    )
    assert "has no test set of" in refusal(run, "--baseline", write_set(tmp_path / "named", "else", other))
    folder = write_set(tmp_path / "label", "speech", other)
    (folder / "speech.json").write_text((folder / "speech.json").read_text().replace('"basic-3"', '"none-1"'))
    assert "was scored by none-1, but" in refusal(run, "--baseline", folder)
    assert not (tmp_path / "out").exists()


def test_a_damaged_run_is_refused_by_file(refusal, run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    (run / "best.json").write_text("")
    assert "best.json is damaged: remove it" in refusal(run, "--step", "best")
    (run / "best.json").write_text('{"step": Infinity}')
    assert "best.json is damaged: remove it" in refusal(run, "--step", "best")
    (run / "best.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write("[1]\n")
    assert "metrics.jsonl are damaged (line " in refusal(run)


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "evaluation", "step": 8},
        {"kind": "evaluation", "step": "8", "name": "speech", "wer": 0.5},
        {"kind": "evaluation", "step": 8, "name": "speech", "wer": "0.5"},
        {"kind": "train", "step": 8, "loss": [2.0]},
    ],
)
def test_a_row_that_no_run_writes_is_refused_by_line(refusal, run, tmp_path, row):
    run = shutil.copytree(run, tmp_path / "run")
    num_rows = len((run / "metrics.jsonl").read_text().splitlines())
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert f"metrics.jsonl are damaged (line {num_rows + 1} is not a row of a run)" in refusal(run)


def test_lines_and_figures_must_belong_together(refusal, tmp_path):
    folder = write_set(tmp_path, "speech", [utterance(0, "a b", "a b"), utterance(1, "a b", "a")])
    lines = (folder / "speech.jsonl").read_text().splitlines(keepends=True)
    (folder / "speech.jsonl").write_text(lines[0])
    sentence = refusal(folder)
    assert "speech.jsonl and speech.json do not belong together: 1 utterance with 0 word errors against 2 with 1" in (
        sentence
    )
    (folder / "speech.jsonl").write_text(lines[0] * 2)
    assert "2 utterances with 0 word errors against 2 with 1" in refusal(folder)


def test_a_function_that_results_name_is_not_run(report, refusal, tmp_path):
    folder = write_set(tmp_path / "results", "speech", [utterance(0, f"touch {tmp_path / 'ran'}", "a")])
    text = (folder / "speech.json").read_text().replace('"basic-3"', '"subprocess:getoutput-1"')
    (folder / "speech.json").write_text(text)
    assert "add `--normalizer subprocess:getoutput` if you trust it" in refusal(folder)
    assert not (tmp_path / "ran").exists()
    assert report(folder, "--normalizer", "subprocess:getoutput").code == 0
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    (folder / "speech.json").write_text(text.replace('"subprocess', '"subprocess:getoutput-1+subprocess'))
    named = ("--normalizer", "subprocess:getoutput")
    assert "add `--target-text subprocess:getoutput` if you trust it" in refusal(folder, *named)
    assert not (tmp_path / "ran").exists()


def test_names_that_are_no_utf8_are_shown(report, tmp_path):
    folder = write_set(tmp_path / "caf\udce9", "caf\udce9", [utterance(0, "a b", "a")])
    assert report(folder, "--out", tmp_path / "out").code == 0
    assert parse(tmp_path / "out" / "report.html").all("h1")[0].text.endswith("caf?")
    assert "## Test set caf?" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_damaged_results_are_refused_by_file(refusal, tmp_path):
    folder = write_set(tmp_path, "speech", [utterance(0, "a b", "a b")])
    line = json.loads((folder / "speech.jsonl").read_text())
    (folder / "speech.jsonl").write_text(json.dumps(line | {"word_deletions": "two"}) + "\n")
    assert "speech.jsonl, line 1: its error counts are missing or damaged" in refusal(folder)
    del line["orthographic_character_insertions"]
    (folder / "speech.jsonl").write_text(json.dumps(line) + "\n")
    assert "speech.jsonl, line 1: its error counts are missing" in refusal(folder)
    score = score_of(folder, "speech")
    del score["orthographic"]["characters"]
    (folder / "speech.json").write_text(json.dumps(score))
    assert "speech.json is not the result of a test set (orthographic.characters: " in refusal(folder)
    folder = write_set(tmp_path / "label", "speech", [utterance(0, "a b", "a b")])
    text = (folder / "speech.json").read_text().replace('"basic-3"', '"upper_case+basic-3"')
    (folder / "speech.json").write_text(text)
    assert "The normalizer 'upper_case+basic-3' has an unknown step" in refusal(folder)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--step", "last"), "argument --step: must be a number of steps, newest or best, but is 'last' instead"),
        (("--shards", "speech"), "argument --shards: must be NAME=FOLDER, but is 'speech' instead"),
        (("--max-audio-megabytes", "1e308"), "must be a positive number below 1e9, but is '1e308' instead"),
        (("--num-clips", "-1"), "argument --num-clips: must be a whole number that is not negative"),
    ],
)
def test_the_grammar_refuses(report, run, arguments, sentence):
    result = report(run, *arguments)
    assert result.code == 2
    assert sentence in result.err


def test_torch_is_not_imported(run, tmp_path):
    """Importing torch takes seconds, and a report does not need it."""
    script = (
        "import sys\n"
        "from voxtral_dist.cli.main import main\n"
        "try:\n"
        f"    main(['report', {str(run)!r}, '--out', {str(tmp_path)!r}])\n"
        "finally:\n"
        "    print([name for name in ('torch', 'transformers', 'mistral_common') if name in sys.modules])\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"

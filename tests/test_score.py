"""`voxtral-dist score`: needs no model and no torch, and refuses mistakes with one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import Result, run_command

Rows = list[dict[str, object]]


@pytest.fixture
def score(capsys) -> Callable[..., Result]:
    """Run the command in this process."""

    def run(*arguments: object) -> Result:
        return run_command(capsys, "score", *arguments)

    return run


@pytest.fixture
def refusal(score) -> Callable[..., str]:
    """The message of a refused command, which prints nothing else."""

    def run(*arguments: object) -> str:
        return score(*arguments).refusal()

    return run


def write_rows(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> dict[str, object]:
    return json.loads(path.read_text(encoding="utf-8"))


ROWS: Rows = [
    {"reference": "Ten colours, please.", "hypothesis": "10 colors please", "language": "en", "domain": "shop"},
    {"reference": "vier fünf", "hypothesis": "", "language": "de", "duration_seconds": 3, "fields": {"domain": "news"}},
    # A Unicode line separator does not end a row.
    {"reference": "six\u2028seven", "hypothesis": "six seven", "key": "a", "hit_limit": True},
]


@pytest.fixture
def hypotheses(tmp_path) -> Path:
    return write_rows(tmp_path / "speech.jsonl", ROWS)


def test_hypotheses_are_scored_and_written_again(score, hypotheses, tmp_path):
    result = score(hypotheses, "--slices", "domain", "--out", tmp_path / "out")
    assert result.code == 0, result
    written = read(tmp_path / "out" / "speech.json")
    # `Ten colours` against `10 colors`, and an empty hypothesis of two words.
    assert written["words"] == {"substitutions": 2, "deletions": 2, "insertions": 0, "reference_length": 7}
    assert written["wer"] == 4 / 7
    assert written["orthographic"]["wer"] == 5 / 7
    assert (written["num_empty_hypotheses"], written["num_limit_hits"], written["audio_seconds"]) == (1, 1, None)
    domains = {label: part["wer"] for label, part in written["slices"]["domain"].items()}
    assert domains == {"news": 1.0, "shop": 2 / 3, "unknown": 0.0}
    lines = [line.split() for line in result.out.splitlines()]
    assert ["basic-3", "57.14", "%"] in [line[:3] for line in lines]
    assert ["domain", "shop", "66.67", "%"] in [line[:4] for line in lines]
    assert "1 empty hypothesis, 0 empty references, 1 ended by the token limit, 0 repetition loops" in result.out


def test_what_was_written_scores_the_same_again(score, hypotheses, tmp_path):
    options = ("--slices", "domain", "--normalizer", "whisper_english")
    first = score(hypotheses, *options, "--out", tmp_path / "first")
    second = score(tmp_path / "first" / "speech.jsonl", *options, "--out", tmp_path / "second")
    assert first.out == second.out
    for name in ("speech.json", "speech.jsonl"):
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text()
    assert read(tmp_path / "first" / "speech.json")["words"]["substitutions"] == 0, (
        "spelling and numbers are evened out"
    )


def test_listed_words_and_detected_languages_are_reported(score, tmp_path):
    rows = [
        {"reference": "call siobhan", "hypothesis": "call chevon", "language": "en", "detected_language": "en"},
        {"reference": "ja", "hypothesis": "ja", "language": "de", "detected_language": None},
    ]
    path = write_rows(tmp_path / "a.jsonl", [row | {"asks_for_language": True} for row in rows])
    (tmp_path / "words.txt").write_text("Siobhan\n")
    out = score(path, "--words", tmp_path / "words.txt").out
    assert "B-WER 100.00 %, U-WER 0.00 %" in out
    assert "language accuracy 50.00 % of 2 utterances" in out
    assert "B-WER" not in score(path).out


def test_steps_of_target_text_come_first(score, hypotheses):
    out = score(hypotheses, "--normalizer", "none", "--target-text", "lower_case", "no_punctuation").out
    assert "lower_case+no_punctuation+none-1" in out


def test_many_slices_are_not_all_printed(score, tmp_path):
    rows = [{"reference": "a", "hypothesis": "a", "speaker": f"s{number}"} for number in range(30)]
    rows += [{"reference": "a", "hypothesis": "b", "speaker": "often"}] * 2
    out = score(write_rows(tmp_path / "a.jsonl", rows), "--slices", "speaker", "--out", tmp_path / "out").out
    assert len([line for line in out.splitlines() if line.startswith("speaker ")]) == 20
    assert "speaker often" in out
    assert "speaker: the 20 largest of 31 slices" in out
    assert "intervals resample speakers" in out
    assert len(read(tmp_path / "out" / "a.json")["slices"]["speaker"]) == 31


def run_of(tmp_path: Path, name: str, num_wrong: int) -> Path:
    """Forty utterances of two words; the first `num_wrong` have one wrong word."""
    rows = [
        {
            "key": f"k{number}",
            "reference": f"a {number}",
            "hypothesis": f"{'x' if number < num_wrong else 'a'} {number}",
        }
        for number in range(40)
    ]
    return write_rows(tmp_path / name / "speech.jsonl", rows)


def test_two_runs_are_compared(score, tmp_path):
    first, second = run_of(tmp_path, "one", 24), run_of(tmp_path, "two", 4)
    # In another order: utterances are paired by key.
    second.write_text("".join(reversed(second.read_text().splitlines(keepends=True))))
    result = score(first, second, "--out", tmp_path / "out")
    assert result.code == 0, result
    comparison = read(tmp_path / "out" / "comparison.json")
    assert comparison["difference"] == (4 - 24) / 80
    low, high = comparison["difference_interval"]
    assert low < -0.25 < high < 0
    assert comparison["probability_of_improvement"] == 1.0
    assert comparison["p_value"] < 1e-6
    assert (comparison["num_utterances"], comparison["resampled"]) == (40, "utterance")
    assert (comparison["first"], comparison["normalizer"]) == (str(first), "basic-3")
    assert read(tmp_path / "out" / "first" / "speech.json")["wer"] == 24 / 80
    assert read(tmp_path / "out" / "second" / "speech.json")["wer"] == 4 / 80
    assert result.out.splitlines()[-1].startswith("Second against first: WER -25.00 points [-")
    assert "probability of improvement 1.000, p = " in result.out


def test_utterances_without_keys_are_compared_line_by_line(score, refusal, tmp_path):
    rows = [{"reference": "a", "hypothesis": "a"}, {"reference": "b", "hypothesis": "c"}]
    first = write_rows(tmp_path / "a.jsonl", rows)
    better = write_rows(tmp_path / "b.jsonl", [rows[0], rows[1] | {"hypothesis": "b"}])
    assert "Second against first: WER -50.00 points [-100.00, +0.00]" in score(first, better).out
    assert "(2 against 1 utterance without keys)" in refusal(first, write_rows(tmp_path / "c.jsonl", rows[:1]))
    assert "(the references of utterance 1 differ)" in refusal(first, write_rows(tmp_path / "d.jsonl", rows[::-1]))


def test_runs_on_other_utterances_are_refused(refusal, tmp_path):
    first, second = run_of(tmp_path, "one", 3), run_of(tmp_path, "two", 5)
    lines = second.read_text().splitlines(keepends=True)
    second.write_text("".join(lines[1:]))
    sentence = refusal(first, second, "--out", tmp_path / "out")
    assert "do not hold the same utterances (1 key in only one of them, such as 'k0')" in sentence
    second.write_text("".join([lines[0].replace('"a 0"', '"A 0"'), *lines[1:]]))
    assert "(the references of 'k0' differ)" in refusal(first, second)
    assert not (tmp_path / "out").exists()


def test_two_runs_are_compared_by_characters(score, tmp_path):
    first, second = run_of(tmp_path, "one", 24), run_of(tmp_path, "two", 4)
    result = score(first, second, "--metric", "cer", "--out", tmp_path / "out")
    comparison, written = read(tmp_path / "out" / "comparison.json"), read(tmp_path / "out" / "first" / "speech.json")
    length = sum(len(f"a {number}") for number in range(40))
    assert (comparison["metric"], comparison["difference"]) == ("cer", (4 - 24) / length)
    low, high = written["cer_interval"]
    assert low < written["cer"] == 24 / length < high
    assert f"Second against first: CER {-100 * 20 / length:+.2f} points [-" in result.out
    assert comparison["p_value"] < 1e-6


@pytest.mark.parametrize(
    ("name", "contents", "options"),
    [
        ("nemo.jsonl", '{"audio_filepath": "a.wav", "text": "a b c", "pred_text": "a x c", "duration": 2}\n', ()),
        (
            "other.jsonl",
            '{"said": "a b c", "heard": "a x c"}\n',
            ("--reference-field=said", "--hypothesis-field=heard"),
        ),
        ("table.csv", '\ufeffid,reference,hypothesis,duration\n1,"a b, c",a x c,2.0\n', ()),
        ("table.tsv", "said\tpred_text\na b c\ta x c\n", ("--reference-field=said",)),
    ],
)
def test_rows_of_other_tools_are_scored(score, tmp_path, name, contents, options):
    (tmp_path / name).write_text(contents, encoding="utf-8")
    result = score(tmp_path / name, *options, "--out", tmp_path / "out")
    assert result.code == 0, result
    written = read(tmp_path / "out" / f"{Path(name).stem}.json")
    assert written["words"] == {"substitutions": 1, "deletions": 0, "insertions": 0, "reference_length": 3}
    assert written["audio_seconds"] == (2.0 if "duration" in contents else None)


@pytest.mark.parametrize(
    ("references", "hypotheses"),
    [
        ("a b c\nd e\n", "a x c\n\n"),
        ("utt-1 a b c\nutt-2 d e\n", "utt-2\nutt-1 a x c\n"),
        ("a b c (s1-1)\nd e (s1-2)\n", "(s1-2)\na x c (s1-1)\n"),
        ("a b c\r\nd e", "a x c\r\n\r\n"),
    ],
    ids=["lines", "Kaldi", "trn", "Windows"],
)
def test_pairs_of_text_files_are_scored(score, tmp_path, references, hypotheses):
    for name, contents in (("ref", references), ("hyp", hypotheses)):
        (tmp_path / f"{name}.txt").write_bytes(contents.encode())
    result = score(tmp_path / "hyp.txt", "--references", tmp_path / "ref.txt", "--out", tmp_path / "out")
    assert result.code == 0, result
    written = read(tmp_path / "out" / "hyp.json")
    # An empty hypothesis is two deletions.
    assert written["words"] == {"substitutions": 1, "deletions": 2, "insertions": 0, "reference_length": 5}


def test_pairs_of_text_files_that_do_not_fit_are_refused(refusal, tmp_path):
    (tmp_path / "ref.txt").write_text("utt1 a\nutt2 b\n")
    (tmp_path / "hyp.txt").write_text("utt1 a\n")
    both = (tmp_path / "hyp.txt", "--references", tmp_path / "ref.txt")
    assert "ref.txt has 2 lines, but" in refusal(*both)
    (tmp_path / "hyp.txt").write_text("a (1)\n")
    (tmp_path / "ref.txt").write_text("a (1)\nb (2)\n")
    assert "1 are in only one of them, such as '2'" in refusal(*both)
    assert "`--references`" in refusal(tmp_path / "hyp.txt", "--references", tmp_path / "nowhere.txt")
    assert "`--language` has the language 'Klingon'" in refusal(*both, "--language", "Klingon")


def test_languages_without_spaces_are_scored_by_characters(score, tmp_path):
    rows = [
        {"reference": "而 对 楼市 成交", "hypothesis": "而对楼市成交", "language": "zh"},
        {"reference": "สวัสดีครับ", "hypothesis": "สวัสดี ครับ"},
    ]
    result = score(write_rows(tmp_path / "a.jsonl", rows), "--out", tmp_path / "out")
    written = read(tmp_path / "out" / "a.json")
    assert (written["cer"], written["orthographic"]["cer"], written["num_without_spaces"]) == (0, 0, 2)
    assert "2 of 2 references in languages without spaces between words: WER is all or nothing" in result.out
    assert "all or nothing" not in score(write_rows(tmp_path / "b.jsonl", ROWS)).out


def test_other_rates_are_printed_and_written(score, tmp_path):
    rows = [{"reference": "Hello, world. Fine?", "hypothesis": "Hello world. Fine! yes", "language": "en"}]
    result = score(write_rows(tmp_path / "a.jsonl", rows), "--out", tmp_path / "out")
    written = read(tmp_path / "out" / "a.json")
    assert (written["mer"], written["wil"]) == (1 / 4, 1 - 3 / 3 * 3 / 4)
    marks = {"substitutions": 1, "deletions": 1, "insertions": 0, "reference_length": 3}
    assert written["punctuation"] == marks | {"rate": 2 / 3, "per": 2 / 3}
    assert "MER 25.00 %, WIL 25.00 %, punctuation error rate 66.67 % (1 S, 1 D, 0 I of 3 marks)" in result.out


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("no json", "line 2: invalid JSON (expected "),
        ('{"reference": "a"', "line 2: invalid JSON (EOF while parsing"),
        ("[1, 2]", "line 2: an utterance must be a JSON object with `reference` and `hypothesis`"),
        ('{"said": "a", "hypothesis": "a"}', "line 2: `reference` is missing: an utterance needs"),
        ('{"reference": "a", "hypothesis": null}', "line 2: `hypothesis`: input should be a valid string, but is None"),
        (
            '{"reference": "a", "hypothesis": "a", "duration_seconds": -1}',
            "line 2: `duration_seconds`: input should be",
        ),
        (
            '{"reference": "a", "hypothesis": "a", "duration_seconds": NaN}',
            "line 2: `duration_seconds`: input should be",
        ),
        ('{"reference": "a", "hypothesis": "a", "fields": []}', "line 2: `fields`: input should be"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_number(refusal, hypotheses, line, sentence):
    hypotheses.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    assert f"{hypotheses}, {sentence}" in refusal(hypotheses)


def test_a_long_value_does_not_fill_the_sentence(refusal, hypotheses):
    hypotheses.write_text(json.dumps({"reference": ["word"] * 10_000, "hypothesis": ""}) + "\n")
    assert len(refusal(hypotheses)) < 400


def test_a_byte_order_mark_is_no_part_of_a_line(score, hypotheses):
    plain = score(hypotheses)
    hypotheses.write_bytes(b"\xef\xbb\xbf" + hypotheses.read_bytes().replace(b"\n", b"\r\n"))
    assert score(hypotheses) == plain


def test_bytes_that_are_no_text_are_refused_by_file_and_number(refusal, hypotheses):
    hypotheses.write_bytes(b'\n{"reference": "\xff", "hypothesis": ""}')
    assert f"{hypotheses}, line 2: invalid JSON (" in refusal(hypotheses)


def test_other_mistakes_are_one_sentence(refusal, hypotheses, tmp_path):
    assert "nowhere.jsonl cannot be read: No such file" in refusal(tmp_path / "nowhere.jsonl")
    assert "cannot be read: Is a directory" in refusal(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "empty.jsonl are empty" in refusal(tmp_path / "empty.jsonl")
    assert "`--words`: " in refusal(hypotheses, "--words", tmp_path / "nowhere.txt")
    assert "nowhere cannot be imported" in refusal(hypotheses, "--normalizer", "nowhere:f")
    assert "would be replaced, but it is the scored file" in refusal(hypotheses, "--out", tmp_path)
    assert "`--out`: " in refusal(hypotheses, "--out", tmp_path / "empty.jsonl")
    assert "`--slices nowhere`: no line of" in refusal(hypotheses, "--slices", "nowhere")
    assert "`--slices nowhere`: no line of" in refusal(hypotheses, "--slices", "duration", "nowhere")
    assert "`--speaker-field duration`: no line of" in refusal(hypotheses, "--speaker-field", "duration")
    assert "`--speaker-field nowhere`: no line of" in refusal(hypotheses, "--speaker-field", "nowhere")


def test_a_function_that_fails_on_a_text_is_one_sentence(refusal, hypotheses, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "fails_on_german.py").write_text("def f(text):\n    assert 'vier' not in text\n    return text\n")
    assert "failed on the text 'vier fünf'" in refusal(hypotheses, "--normalizer", "fails_on_german:f")


def test_nothing_that_was_scored_is_replaced(refusal, tmp_path):
    first, second = (write_rows(tmp_path / name / "s.jsonl", ROWS) for name in ("first", "second"))
    before = first.read_bytes()
    # The first file's results would replace the second file.
    assert "would be replaced" in refusal(second, first, "--out", tmp_path)
    assert first.read_bytes() == second.read_bytes() == before
    lines = write_rows(tmp_path / "first" / "rows.json", ROWS)
    assert "rows.json would be replaced" in refusal(lines, "--out", tmp_path / "first")
    assert not (tmp_path / "first" / "rows.jsonl").exists()


def test_nothing_but_results_is_replaced(score, refusal, hypotheses, tmp_path):
    out = tmp_path / "out"
    manifest = write_rows(out / "speech.jsonl", [{"audio_filepath": "a.wav", "text": "what a human wrote"}])
    before = manifest.read_bytes()
    assert f"{manifest} would be replaced, and is not known to be a result" in refusal(hypotheses, "--out", out)
    (out / "speech.json").write_text("{}")
    assert "speech.jsonl would be replaced" in refusal(hypotheses, "--out", out)
    assert manifest.read_bytes() == before
    for path in list(out.iterdir()):
        path.unlink()
    for _ in range(2):
        assert score(hypotheses, "--out", out).code == 0
        assert score(hypotheses, hypotheses, "--out", out).code == 0
    # A `comparison.json` is replaced only if it is a comparison.
    own = write_rows(out / "comparison.json", ROWS)
    assert "comparison.json would be replaced, but it is the scored file" in refusal(own, hypotheses, "--out", out)
    assert "comparison.json would be replaced, and is not known" in refusal(hypotheses, hypotheses, "--out", out)
    assert own.read_text() == "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def test_speakers_that_one_of_two_files_tells_are_enough(score, tmp_path):
    rows = [{"reference": "a", "hypothesis": "a", "key": str(number)} for number in range(6)]
    told = write_rows(tmp_path / "told.jsonl", [row | {"who": row["key"]} for row in rows])
    untold = write_rows(tmp_path / "untold.jsonl", rows)
    assert score(untold, told, "--speaker-field", "who").code == 0


def test_what_is_known_of_an_utterance_makes_slices_too(score, hypotheses, tmp_path):
    assert score(hypotheses, "--slices", "key", "--out", tmp_path / "out").code == 0
    assert read(tmp_path / "out" / "speech.json")["slices"]["key"].keys() == {"a", "unknown"}


def test_the_loss_of_a_diverged_model_has_no_perplexity(hypotheses):
    from voxtral_dist.score import ScoreOptions, score_file
    from voxtral_dist.scoring.normalizer import normalizer
    from voxtral_dist.scoring.results import Measurements, score_test_set

    scored = score_file(hypotheses, ScoreOptions())
    whole = score_test_set(scored.utterances, normalizer("basic"), measured=Measurements(loss=1e4))
    assert (whole.measured.loss, whole.measured.perplexity) == (1e4, None)


def test_a_name_that_no_normalizer_has_is_refused_by_the_grammar(score, hypotheses):
    result = score(hypotheses, "--normalizer", "bsic")
    assert result.code == 2
    known = "none, basic, whisper_english, whisper_basic, open_asr_en"
    assert f"argument --normalizer: must be {known}, or a function" in result.err


def test_what_the_terminal_cannot_show_is_escaped(tmp_path):
    """Runs a separate process, because the encoding is set for its output."""
    path = write_rows(tmp_path / "a.jsonl", [{"reference": "a", "hypothesis": "a", "speaker": "日"}])
    ended = subprocess.run(
        [Path(sys.executable).with_name("voxtral-dist"), "score", path, "--slices", "speaker"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        timeout=120,
        check=True,
    )
    assert b"speaker \\u65e5 " in ended.stdout


def test_neither_torch_nor_transformers_is_imported(hypotheses):
    """Importing them takes seconds, and scoring does not need them."""
    script = (
        "import sys\n"
        "from voxtral_dist.cli.main import main\n"
        "try:\n"
        f"    main(['score', {str(hypotheses)!r}])\n"
        "finally:\n"
        "    print([name for name in ('torch', 'transformers', 'mistral_common') if name in sys.modules])\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"

"""What is printed holds neither control characters nor secrets; files keep the original texts."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from rich.console import Console

from voxtral_dist.cli.main import main
from voxtral_dist.output.console import one_line, printable, say, set_up_logging
from voxtral_dist.progress import ProgressDisplay

from commands import run_command
from corpora import tone, write_lines

HOSTILE = "a\x1b[2J\x07\rb\x9b31m\u202ec\x7f\x00"
SHOWN = "a\\u001b[2J\\u0007\\u000db\\u009b31m\\u202ec\\u007f\\u0000"


def test_control_characters_are_shown_as_escapes():
    assert printable(HOSTILE) == SHOWN
    assert printable("tab\tline\nÜber 語 e\u0301 \u200d\u200f") == "tab\tline\nÜber 語 e\u0301 \u200d\u200f"
    assert one_line("a\nb\tc\u2028d") == "a\\u000ab\\u0009c\\u2028d"


def test_printed_json_means_the_same(capsys):
    say(json.dumps({"text": HOSTILE}, ensure_ascii=False))
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"text": HOSTILE}
    assert printed.strip().isprintable()


def test_log_messages_are_printable(capsys):
    set_up_logging()
    handler = logging.lastResort
    assert handler is not None
    record = logging.LogRecord("voxtral_dist", logging.WARNING, __file__, 1, "lost %s", (HOSTILE,), None)
    assert handler.format(record) == f"lost {SHOWN}"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_progress_display_shows_names_as_they_are(tmp_path, is_terminal):
    with (tmp_path / "out").open("w", encoding="utf-8") as file:
        console = Console(file=file, force_terminal=is_terminal, width=200)
        with ProgressDisplay(f"pack [/x] {HOSTILE}", 2, console=console) as display:
            display.show(1, f"[red] {HOSTILE}")
            display.say(HOSTILE)
    shown = (tmp_path / "out").read_text(encoding="utf-8")
    assert "\x1b[2J" not in shown
    assert "\x07" not in shown
    assert f"pack [/x] {SHOWN}" in shown
    assert f"[red] {SHOWN}" in shown


@pytest.fixture
def packed(capsys, tmp_path) -> Path:
    """A set with an utterance whose key, text and fields hold escape codes, and a second one that was skipped."""
    name = "k\x1b]0;x\x07\nvoxtral-dist: error: forged.wav"
    soundfile.write(tmp_path / name, tone(0.5), 16_000)
    row = {"audio_filepath": name, "text": f"one {HOSTILE}", "speaker": HOSTILE}
    bad = row | {"audio_filepath": "gone\x1b[31m.wav"}
    manifest = write_lines(tmp_path / "manifest.jsonl", [row, bad])
    result = run_command(capsys, "shards", "pack", manifest, tmp_path / "set", "--skip-bad", "--workers", 1)
    assert result.code == 0, result
    assert_harmless(result.out + result.err)
    return tmp_path / "set"


def assert_harmless(printed: str) -> None:
    assert not set(printed) & {"\x1b", "\x07", "\x9b", "\r", "\u202e", "\x00"}, printed
    assert not any(line.startswith("voxtral-dist: error: forged") for line in printed.splitlines())


def test_commands_print_hostile_names_and_texts_harmlessly(packed, capsys):
    for command in (("inspect", packed), ("verify", packed, "--workers", 1), ("show", packed, "#0")):
        result = run_command(capsys, "shards", *command)
        assert result.code == 0, result
        assert_harmless(result.out + result.err)
    # Packing makes spaces of line breaks in texts.
    assert f"text       one {SHOWN}".replace("\\u000d", " ") in result.out


def test_files_keep_the_original(packed):
    tar = next(packed.glob("*.tar")).read_bytes()
    assert json.dumps(f"one {HOSTILE}".replace("\r", " "), ensure_ascii=False).encode() in tar
    (skipped,) = [json.loads(line) for line in (packed / "skipped.jsonl").read_text().splitlines()]
    assert "gone\x1b[31m" in skipped["key"]


def test_a_message_with_a_hostile_name_is_one_harmless_line(capsys, tmp_path):
    result = run_command(capsys, "shards", "inspect", tmp_path / "no\x1b[2J\nwhere")
    assert "\\u001b[2J\\u000awhere" in result.refusal()


def test_arguments_are_printed_harmlessly(capsys):
    result = run_command(capsys, "shards", "inspect", "a", "--no\x1b[2J")
    assert_harmless(result.err)


def test_an_unexpected_error_is_printed_harmlessly(tmp_path):
    script = f"""
import voxtral_dist.cli.main as program
def fail(arguments):
    raise KeyError({HOSTILE!r} + "https://me:hunter22@host/")
program.main = fail
program.console()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "hunter22" not in ended.stderr
    assert_harmless(ended.stderr)


def test_main_is_the_place_where_messages_are_printed(capsys):
    with pytest.raises(SystemExit):
        main(["config", "check", "no\x9bwhere.yaml"])
    assert "no\\u009bwhere.yaml" in capsys.readouterr().err

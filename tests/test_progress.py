"""The progress display of long commands."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from voxtral_dist import progress
from voxtral_dist.progress import ProgressDisplay, progress_of_command


def test_without_a_terminal_the_first_and_the_last_item_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay("pack", 5) as display:
        for number in range(1, 6):
            display.show(number, f"{number} skipped", seconds_left=90.0)
    assert capsys.readouterr().out == "pack 1/5  1 skipped  left 1.5 min\npack 5/5  5 skipped  left 1.5 min\n"


def test_without_its_ends_a_short_command_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay("pack", 5, prints_ends=False) as display:
        for number in range(1, 6):
            display.show(number)
    assert capsys.readouterr().out == ""


def test_a_command_whose_results_tell_its_progress_prints_no_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    for prints_lines in (True, False):
        with progress_of_command("transcribe", 2, prints_lines=prints_lines) as display:
            display.show(1)
        printed = capsys.readouterr()
        assert (printed.out, printed.err) == ("", "transcribe 1/2\n" if prints_lines else "")


def test_results_that_are_piped_to_a_file_do_not_go_to_the_terminal_of_the_bar(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with ProgressDisplay("verify", 2, console=console, redirects_output=True) as display:
        print("broken: #1")
        display.show(2)
    assert capsys.readouterr().out == "broken: #1\n"
    assert "broken" not in console.file.getvalue()
    assert "verify" in console.file.getvalue()


def test_between_them_a_line_is_printed_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    display = ProgressDisplay("index", None)
    display.show(1)
    display.show(2, total=4)
    display.show(3)
    assert capsys.readouterr().out.splitlines() == ["index 1", "index 2/4", "index 3/4"]


def test_a_terminal_shows_a_bar_and_lines_above_it() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with ProgressDisplay("step", 3, console=console) as display:
        display.show(2, "loss 1.5")
        display.say("[a line] of the command")
    shown = console.file.getvalue()
    assert "[a line] of the command\n" in shown
    assert "2/3" in shown
    assert "loss 1.5" in shown


def test_a_narrow_terminal_shows_the_number_and_all_of_the_note() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    note = "loss 0.336  lr 2.4e-03  held_out_voices WER 196.1 %  69 audio s/s  0.7 GB  waiting for data 12 %"
    with ProgressDisplay("step", 1000, console=console) as display:
        display.show(240, note)
    shown = Text.from_ansi(console.file.getvalue()).plain
    assert " 240/1000 " in shown
    assert all(word in shown for word in note.split())

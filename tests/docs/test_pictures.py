"""The README's pictures: small, complete in themselves, and drawn from what a terminal really shows."""

import io
import re
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from scripts import script

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"
MAX_BYTES = 150_000


@pytest.fixture(scope="module")
def make() -> ModuleType:
    return script("docs/pictures/make.py")


def shown(screen) -> list[str]:
    return [Text.from_ansi(line).plain.rstrip() for line in screen.lines]


def test_a_screen_has_the_last_state_of_the_live_display_below_all_lines(make):
    # A pseudo terminal writes a carriage return before each line end.
    written = io.StringIO(newline="\r\n")
    console = Console(file=written, force_terminal=True, width=80, color_system="truecolor")
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(10), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("train", total=1000, loss="-")
        for step in range(1, 5):
            progress.update(task, completed=step, loss=f"{1 / step:.2f}", refresh=True)
            console.print(f"line {step}")
    screen = make.Screen()
    text = written.getvalue()
    # Codes may be cut anywhere by a read.
    for start in range(0, len(text), 3):
        screen.feed(text[start : start + 3])
    *lines, bar = [line for line in shown(screen) if line]
    assert lines == ["line 1", "line 2", "line 3", "line 4"]
    assert re.sub(r"[━╸╺ ]+", " ", bar) == "step 4/1000 loss 0.25"


def test_a_drawn_terminal_has_its_newest_lines(make, tmp_path):
    screen = make.Screen()
    screen.feed("".join(f"\x1b[32mrow-{number}\x1b[0m\r\n" for number in range(40)))
    make.draw_terminal(screen, tmp_path / "display.svg")
    drawn = (tmp_path / "display.svg").read_text(encoding="utf-8")
    assert "row-39" in drawn
    assert "row-20" not in drawn


@pytest.mark.parametrize("name", ["display.svg", "report.png"])
def test_pictures_are_small_and_shown(name):
    assert 0 < (PICTURES / name).stat().st_size < MAX_BYTES
    assert f"docs/pictures/{name}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"pictures/{name}" in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")


def test_the_drawn_display_loads_nothing_and_names_no_place_of_a_machine():
    drawn = (PICTURES / "display.svg").read_text(encoding="utf-8")
    assert "url(http" not in drawn
    assert "font-face" not in drawn
    assert "/home/" not in drawn
    assert ".venv" not in drawn

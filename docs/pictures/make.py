"""Make the pictures of the README from a real run: `make pictures`, after `make demo`.

display.svg: the terminal of the demo's training, run anew until `PICTURED_STEP` and then stopped by SIGTERM.
report.png: the top of the demo's report.html in headless Chromium.
"""

import codecs
import contextlib
import fcntl
import io
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

PICTURES = Path("docs/pictures")
DEMO_RUN = Path("runs/demo")
RUN_DIR = Path("build/pictures/run")
COMMAND = "deepspeed --num_accelerators 2 launch/train.py --config launch/recipes/demo.yaml"
PICTURED_STEP = 120
NUM_COLUMNS, NUM_LINES = 116, 10
REPORT_SIZE = (1100, 1420)
# What a terminal does with the display's bytes: text, colours, line ends, and the codes to draw over earlier lines.
_TOKENS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+")
_STEP = re.compile(r"([\d,]+)/[\d,]+ ")
# A code whose end has not been read yet.
_UNFINISHED = re.compile(r"(\x1b(\[[0-9;?]*)?)?$")


def main() -> None:
    """Write both pictures."""
    if not (DEMO_RUN / "report.html").is_file():
        sys.exit(f"{DEMO_RUN / 'report.html'} does not exist: run `make demo` first.")
    screen = Screen()
    record_training(screen)
    draw_terminal(screen, PICTURES / "display.svg")
    photograph(DEMO_RUN / "report.html", PICTURES / "report.png")


class Screen:
    """Lines of a terminal, with their colour codes."""

    def __init__(self) -> None:
        self.lines = [""]
        self._row = 0
        self._at_start = True
        self._unfinished = ""

    def feed(self, text: str) -> None:
        """Apply text, line ends, and the codes by which rich's live display draws over its last lines."""
        text = self._unfinished + text
        complete = _UNFINISHED.sub("", text)
        self._unfinished = text[len(complete) :]
        for token in _TOKENS.findall(complete):
            if token == "\n":
                self._row += 1
                self.lines += [""] * (self._row == len(self.lines))
                self._at_start = True
            elif token == "\r" or token.endswith("K"):
                # The display always writes whole lines, so a carriage return erases, too.
                self._at_start = True
            elif token.endswith("A"):
                self._row -= int(token[2:-1] or 1)
            elif not token.startswith("\x1b") or token.endswith("m"):
                self.lines[self._row] = token if self._at_start else self.lines[self._row] + token
                self._at_start = False

    def step(self) -> int:
        """The step that the display shows, 0 before the first one."""
        shown = _STEP.findall(Text.from_ansi("\n".join(self.lines[-NUM_LINES:])).plain)
        return int(shown[-1].replace(",", "")) if shown else 0


def record_training(screen: Screen) -> None:
    """Train in a pseudo terminal until `PICTURED_STEP`, then ask all processes to stop."""
    shutil.rmtree(RUN_DIR, ignore_errors=True)
    program, *arguments = [*COMMAND.split(), "--set", f"run_dir={RUN_DIR}"]
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, NUM_COLUMNS, 0, 0))
    with subprocess.Popen(
        [str(Path(sys.executable).parent / program), *arguments],
        stdout=follower,
        stderr=follower,
        env=os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"},
        start_new_session=True,
    ) as run:
        os.close(follower)
        is_pictured = False
        for text in output_of(leader):
            if not is_pictured:
                screen.feed(text)
            if not is_pictured and screen.step() >= PICTURED_STEP:
                is_pictured = True
                os.killpg(run.pid, signal.SIGTERM)
    if not is_pictured:
        sys.exit(f"The run ended before step {PICTURED_STEP}:\n" + "\n".join(screen.lines))


def output_of(terminal: int) -> Iterator[str]:
    """Yield what a terminal shows until its last process has ended."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    # On Linux a terminal without processes is an error to read.
    with contextlib.suppress(OSError):
        while read := os.read(terminal, 4096):
            yield decoder.decode(read)


def draw_terminal(screen: Screen, picture: Path) -> None:
    """Write the newest lines of a screen as SVG."""
    console = Console(record=True, width=NUM_COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in screen.lines[-NUM_LINES:]:
        console.print(Text.from_ansi(line))
    svg = console.export_svg(title=COMMAND, theme=MONOKAI, unique_id="display")
    # A picture inside of a page loads no fonts from elsewhere.
    picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")


def photograph(page: Path, picture: Path) -> None:
    """Write the top of a page as PNG with 64 colours."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("There is no Chromium on PATH: install it, for example by `apt-get install chromium`.")
    options = "--headless --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-background-networking"
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        window = f"--window-size={REPORT_SIZE[0]},{REPORT_SIZE[1]}"
        profile = f"--user-data-dir={folder}/profile"
        command = [browser, *options.split(), window, profile, f"--screenshot={shot}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        Image.open(shot).convert("RGB").quantize(64).save(picture, optimize=True)


if __name__ == "__main__":
    main()

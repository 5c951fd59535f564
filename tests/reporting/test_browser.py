"""The page in a browser: nothing is blocked or fails, and players, charts and tables work."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from voxtral_dist.reporting.results_folder import ReportOptions
from voxtral_dist.reporting.writing import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: `apt-get install chromium`")

# What a reader may do; the page's own policy would refuse a script that is not its own.
VISIT = """
const chart = document.querySelector(".chart > svg");
const press = (key) => chart.dispatchEvent(new KeyboardEvent("keydown", {key}));
press("ArrowRight"); press("ArrowRight");
const tables = [...document.querySelectorAll("table.sortable")];
const table = tables.find((one) => one.rows[0].cells[0].textContent === "speaker");
const order = () => [...table.tBodies[0].rows].map((row) => row.cells[0].dataset.value).join();
const orders = [order()];
for (const place of [0, 0, 1, 1]) { table.rows[0].cells[place].querySelector("button").click(); orders.push(order()); }
Promise.all([...document.querySelectorAll("audio")].map((player) => new Promise((resolve) => {
  const done = () => resolve(player.error ? "error" : "plays");
  if (player.readyState || player.error) done();
  player.addEventListener("loadedmetadata", done); player.addEventListener("error", done);
}))).then((players) => {
  const readout = chart.parentElement.querySelector(".readout").textContent;
  document.body.dataset.seen = [readout, ...orders, players.join()].join("|");
});
"""


def visit(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page after its scripts, and the messages of the console."""
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    ended = subprocess.run(
        [
            str(CHROMIUM),
            *options.split(),
            "--disable-component-update",
            "--enable-logging=stderr",
            "--virtual-time-budget=3000",
            f"--user-data-dir={profile}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return ended.stdout, [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_plays_the_clips_reads_the_charts_and_sorts_the_slices(run, tmp_path):
    page, _ = write_report(run, ReportOptions(num_clips=4), tmp_path)
    shown, console = visit(page, tmp_path / "profile")
    assert console == []
    assert shown.count("<audio") == 2 * 4

    # With another script the policy speaks up: so the silence above means something.
    text = page.read_text(encoding="utf-8").replace("</body>", f"<script>{VISIT}</script></body>")
    page.write_text(text, encoding="utf-8")
    shown, console = visit(page, tmp_path / "profile")
    assert any("Content Security Policy" in line for line in console)
    assert "data-seen" not in shown

    page.write_text(re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", text), encoding="utf-8")
    shown, console = visit(page, tmp_path / "profile")
    assert console == []
    seen = re.search(r'data-seen="([^"]*)"', shown)
    assert seen is not None
    readout, worst_first, by_name, by_name_back, by_rate, by_rate_back, players = seen[1].split("|")
    assert readout == "step 2: 1"
    assert by_name.split(",") == [f"speaker-{number}" for number in range(5)]
    assert by_name_back.split(",") == by_name.split(",")[::-1]
    assert by_rate.split(",")[0] == worst_first.split(",")[0] == by_rate_back.split(",")[-1]
    assert players == ",".join(["plays"] * 8)

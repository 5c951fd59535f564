"""The documentation builds without a warning, and what it says of the code is what the code says."""

import argparse
import os
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from voxtral_dist.cli.main import build_parser
from voxtral_dist.config import RunConfig

from scripts import script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning, such as a dead link or anchor, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return script("docs/hooks/reference.py")


class _Links(HTMLParser):
    """Links, anchors and sources of one page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            if value and ((tag == "a" and name == "href") or (tag in ("img", "script") and name == "src")):
                self.targets.append(value)


def test_every_link_inside_the_site_leads_somewhere(site):
    pages = {page: _Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 15
    dead = []
    for page, links in pages.items():
        for target in links.targets:
            if "://" in target or target.startswith(("mailto:", "data:")):
                continue
            path, _, anchor = target.partition("#")
            found = (page.parent / path.partition("?")[0]).resolve() if path else page
            found = found / "index.html" if found.is_dir() else found
            if not found.is_file() or (anchor and found in pages and anchor not in pages[found].anchors):
                dead.append((page.name, target))
    assert not dead


def test_the_site_fetches_nothing_from_elsewhere(site):
    pages = [_Links(page) for page in site.rglob("*.html")]
    text = "".join(page.read_text(encoding="utf-8") for page in site.rglob("*.html"))
    assert pages
    assert "fonts.googleapis.com" not in text


def test_the_reference_names_every_key_of_the_configuration(reference):
    page = reference.configuration_page()
    for section in _sections(RunConfig, reference):
        for name, field in section.model_fields.items():
            assert f".{name}`" in page or f"`{name}`" in page
            assert field.description or reference.section_of(field.annotation), f"{section.__name__}.{name}"


def _sections(section, reference):
    yield section
    for field in section.model_fields.values():
        if (found := reference.section_of(field.annotation)) is not None:
            yield from _sections(found, reference)


def test_the_reference_names_every_option_of_every_command(reference):
    page = reference.command_line_page()
    commands = list(_commands(build_parser()))
    assert len(commands) > 12
    for command in commands:
        assert f"## {command.prog}\n" in page
        for action in command._actions:
            if action.help != argparse.SUPPRESS and "--help" not in action.option_strings:
                assert all(option in page for option in action.option_strings)


def _commands(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield command
                yield from _commands(command)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_every_file_that_a_page_of_the_root_links_to_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_the_drawn_architecture_has_the_boxes_of_its_source():
    source = (ROOT / "docs" / "architecture.dot").read_text(encoding="utf-8")
    drawn = unescape((ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")).replace("\u00a0", " ")
    shown = {text.strip() for text in re.findall(r">([^<]+)</text>", drawn)}
    lines = [line.strip() for label in re.findall(r'\[label="([^"]+)"', source) for line in label.split("\\n")]
    assert len(lines) > 15
    assert [line for line in lines if line not in shown] == []

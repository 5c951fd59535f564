"""The tree in docs/design.md is the tree of the package."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "voxtral_dist"


def drawn_entries() -> list[str]:
    """Files and folders that the page lists, in its order."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    tree = page.partition("```text\nvoxtral_dist/\n")[2].partition("```")[0]
    return re.findall(r"^  (\S+)", tree, re.MULTILINE)


def test_each_file_and_folder_of_the_package_is_drawn_once():
    names = drawn_entries()
    folders = {f"{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    files = {path.name for path in PACKAGE.glob("*.py")}
    assert {name for name in names if name.count("/") < 2} == folders | files
    assert len(set(names)) == len(names)
    assert [name for name in names if not (PACKAGE / name).exists()] == []


def test_paths_that_the_page_names_exist():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    folders = "benchmarks|tests|launch|ds_configs|docker|docs|voxtral_dist"
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", page)
    assert len(named) > 3
    assert [name for name in named if not (ROOT / name).exists()] == []

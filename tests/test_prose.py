"""Docstrings start with a noun phrase or an imperative, and public names of the package have one.

ruff's D1 rules ask for the docstrings; this asks for a subject in their first line.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("voxtral_dist", "benchmarks", "launch", "docs")
# A first line that starts like this has lost its subject ("Of the two matrices of an adapter.").
HEADLESS = re.compile(r"(Of|On|In|At|By|For|From|To|With|Without|As|Around|Inside|Such as|Those|Same|The same)\b(?!-)")


def first_lines() -> Iterator[tuple[str, str]]:
    """Place and first line of every docstring."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node)
                    if text:
                        name = getattr(node, "name", "module")
                        yield f"{path.relative_to(ROOT)}: {name}", text.partition("\n")[0]


def test_the_first_line_of_every_docstring_has_a_subject_or_is_an_imperative() -> None:
    lines = dict(first_lines())
    assert len(lines) > 1500
    assert {place: line for place, line in lines.items() if HEADLESS.match(line)} == {}

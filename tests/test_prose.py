"""Docstrings start with a noun phrase or an imperative, public names of the package have one, and nouns are counted.

ruff's D1 rules ask for the docstrings; this asks for a subject in their first line.
"""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from voxtral_dist.output.counting import counted

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


# What messages count. A number before one of them is written by `counted`, so that no message says "1 GPUs".
COUNTED = (
    "attempts beams bytes cells channels characters clips columns cores differences epochs errors evaluations examples "
    "files folders GPUs hosts hypotheses keys kernels languages lines marks members micro-batches minutes nodes "
    "parameters parts positions ranks recordings references rows shards slices speakers steps targets texts tokens "
    "transcripts updates utterances windows words"
)
BARE = re.compile(rf" (?:[a-z]+ )?({'|'.join(COUNTED.split())})\b(?!/)")
# The verb or preposition between a value and a noun that it does not count.
NOT_COUNTED = re.compile(r" (?:and|as|has|holds|in|is|of|on|sees|to|utterance|utterances) ")


def bare_counts(path: Path) -> Iterator[str]:
    """Places where an f-string puts a number before a plural; a fraction (`.1f`) or a constant is never one."""
    for text in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        values = text.values if isinstance(text, ast.JoinedStr) else []
        for value, after in pairwise(values):
            if not isinstance(value, ast.FormattedValue) or not isinstance(after, ast.Constant):
                continue
            shown = ast.unparse(value.value)
            is_fraction = value.format_spec is not None and re.search(r"\.[1-9]", ast.unparse(value.format_spec))
            is_constant = shown.rpartition(".")[2].isupper()
            is_bare = BARE.match(after.value) and not NOT_COUNTED.match(after.value)
            if is_bare and not (is_fraction or is_constant or shown.startswith("counted(")):
                yield f"{path.relative_to(ROOT)}:{after.lineno}: {{{shown}}}{after.value[:40]}"


def test_a_number_and_its_noun_agree():
    assert (counted(1, "GPU"), counted(0, "GPU"), counted(8, "GPU")) == ("1 GPU", "0 GPUs", "8 GPUs")
    assert counted(1.0, "epoch", "g") == "1 epoch"
    assert counted(0.5, "epoch", "g") == "0.5 epochs"
    assert counted(1200, "step", ",") == "1,200 steps"
    assert counted(2, "micro-batch", plural="micro-batches") == "2 micro-batches"
    assert [place for path in sorted((ROOT / "voxtral_dist").rglob("*.py")) for place in bare_counts(path)] == []

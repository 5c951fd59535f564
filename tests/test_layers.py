"""The rules of the package's tree that import-linter's layers in pyproject.toml do not express."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "voxtral_dist"
MAX_FILES_AT_THE_ROOT = 12

# The only part of the package that imports each of these libraries.
ALLOWED_IMPORTERS = {
    "av": "voxtral_dist.data.stored.media",
    "deepspeed": "voxtral_dist.engine.zero",
    "jiwer": "voxtral_dist.scoring",
    "bitsandbytes": "voxtral_dist.model",
    "mlflow": "voxtral_dist.trackers",
    "peft": "voxtral_dist.model",
    "torchao": "voxtral_dist.model",
    "trackio": "voxtral_dist.trackers",
    "wandb": "voxtral_dist.trackers",
    "webdataset": "voxtral_dist.shards",
}


@cache
def modules() -> dict[str, ast.Module]:
    """The syntax tree of every module of the package by its dotted name."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Dotted names of all imports, wherever they are: `from a import b` gives `a.b`, which may not be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("library", ALLOWED_IMPORTERS)
def test_a_library_is_imported_in_one_part_of_the_package(library: str) -> None:
    importers = {
        module for module, tree in modules().items() for name in imported_names(tree) if is_inside(name, library)
    }
    assert importers, f"no module imports {library}"
    assert [name for name in sorted(importers) if not is_inside(name, ALLOWED_IMPORTERS[library])] == []


def test_imports_form_no_circle() -> None:
    """All imports count, those inside functions and for type checkers too.

    The implicit import of parent packages does not: it would make a circle of every `__init__` that re-exports names.
    """
    trees = modules()
    graph = {
        module: {own for name in imported_names(tree) if (own := module_of(name, trees)) is not None}
        for module, tree in trees.items()
    }
    assert sum(len(targets) for targets in graph.values()) > len(graph), "imports are found"
    # Raises a CycleError that names the modules of a circle.
    TopologicalSorter(graph).prepare()


def module_of(name: str, trees: dict[str, ast.Module]) -> str | None:
    """The module of the package that an imported name is, or is in; None for other packages."""
    if name in trees:
        return name
    parent = name.rpartition(".")[0]
    return parent if parent in trees else None


def test_few_files_are_at_the_root_of_the_package() -> None:
    files = sorted(path.name for path in PACKAGE.iterdir() if path.is_file())
    assert len(files) <= MAX_FILES_AT_THE_ROOT, files

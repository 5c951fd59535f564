"""Scripts of this repository as modules: they are in no package."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def script(path: str) -> Any:
    """The module of a script, by its path in the repository."""
    spec = spec_from_file_location(path.removesuffix(".py").replace("/", "_"), REPOSITORY / path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

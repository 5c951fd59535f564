"""The text of a recipe with other values, and its comments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

_LINE = re.compile(r"(?P<indent> *)(?P<key>\w+):(?P<rest>.*)")
_COMMENT = re.compile(r"\s+#.*$")


def edited_recipe(text: str, values: Mapping[str, Any], heading: str) -> str:
    """The text of a recipe with other values at dotted keys, and another comment at its beginning.

    Lines that do not change stay as they are. A key that the recipe lacks is added at the end of its section.

    Args:
        text: YAML in blocks of two spaces, as the recipes of the package are written.
        values: plain values by their keys, such as `train_data.max_windows`.
        heading: lines of the comment, without `#`.
    """
    lines = text.splitlines()
    while lines and lines[0].startswith("#"):
        del lines[0]
    for key, value in values.items():
        lines = _with_value(lines, key.split("."), value)
    comment = [f"# {line}".rstrip() for line in heading.splitlines()]
    return "\n".join([*comment, *lines, ""])


def _with_value(lines: list[str], keys: list[str], value: Any) -> list[str]:
    """The lines with one value; what was below its key is replaced."""
    first, last = 0, len(lines)
    for depth, key in enumerate(keys):
        place = next((at for at in range(first, last) if _is_key(lines[at], key, depth)), None)
        if place is None:
            indent = "  " * depth
            missing = [f"{indent}{'  ' * number}{name}:" for number, name in enumerate(keys[depth:])]
            missing[-1] += f" {_flow(value)}"
            return [*lines[:last], *missing, *lines[last:]]
        first, last = place + 1, _end_of_block(lines, place, depth)
    place = first - 1
    comment = _COMMENT.search(lines[place])
    head = f"{lines[place].partition(':')[0]}: {_flow(value)}"
    return [*lines[:place], head + (comment[0] if comment else ""), *lines[last:]]


def _is_key(line: str, key: str, depth: int) -> bool:
    found = _LINE.match(line)
    return found is not None and found["key"] == key and len(found["indent"]) == 2 * depth


def _end_of_block(lines: list[str], place: int, depth: int) -> int:
    """The line after what belongs to a key."""
    after = range(place + 1, len(lines))
    return next((at for at in after if len(lines[at]) - len(lines[at].lstrip()) <= 2 * depth), len(lines))


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")

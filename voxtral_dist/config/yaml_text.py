"""YAML that a user wrote: whatever is wrong with it is a `ValueError`."""

from __future__ import annotations

from typing import Any

import yaml

# A configuration has some hundred values at a depth of about ten.
_LARGEST_BYTES = 2**20
_MOST_NODES = 100_000
_MAX_NESTING = 50


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, whose aliases may not make it larger than `_MOST_NODES` values.

    Raises:
        ValueError: the text is not valid YAML, too large or too deeply nested, or a value does not fit its type. The
            message is one line.
    """
    if len(text) > _LARGEST_BYTES:
        raise ValueError(f"it has more than {_LARGEST_BYTES >> 20} MiB")
    try:
        loader = _BoundedLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_large(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except _UnboundedError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
    except Exception as error:
        # Constructors of numbers and dates trust what their patterns let through, such as 0x_ or 2020-99-99.
        why = f" ({' '.join(str(error).split())})" if isinstance(error, ValueError) else ""
        raise ValueError(f"a value does not fit its type{why}") from error


class _UnboundedError(Exception):
    """A text whose value would be too large."""


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with a limit on nesting."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _MAX_NESTING:
            raise _UnboundedError("too deeply nested")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _refuse_large(root: yaml.Node) -> None:
    """Refuse a tree that is too large with every alias written out, and one that contains itself."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        known = sizes.get(id(node), 0)
        if known is None:
            raise _UnboundedError("a value contains itself")
        if known:
            return known
        sizes[id(node)] = None
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        total = 1 + sum(map(size, parts))
        if total > _MOST_NODES:
            raise _UnboundedError("its aliases make it too large")
        sizes[id(node)] = total
        return total

    size(root)

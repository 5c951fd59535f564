"""JSON that others wrote: whatever is wrong with it is a `ValueError`; and checksums of values."""

from __future__ import annotations

import json
from typing import Any

import xxhash

# Deeper values exhaust the stack of whatever copies them later: the encoder, pickle, a validator.
MAX_NESTING = 64


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that is nested at most `MAX_NESTING` deep.

    Raises:
        ValueError: the text is not valid JSON, too deeply nested, or holds a number with thousands of digits. The
            message is a few words, for the end of a sentence in brackets.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason}") from error
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
    except ValueError as error:
        raise ValueError("a number has too many digits") from error
    opening = ("{", "[") if isinstance(text, str) else (b"{", b"[")
    if sum(map(text.count, opening)) > MAX_NESTING and _is_deeper(value, MAX_NESTING):  # type: ignore[arg-type]
        raise ValueError("too deeply nested")
    return value


def json_checksum(value: Any) -> str:
    """The checksum of a value as JSON, XXH3 with 128 bits in hexadecimal; the order of keys does not matter."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether lists and mappings are nested deeper than `limit`."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        values = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in values if isinstance(inner, dict | list)]
    return bool(level)

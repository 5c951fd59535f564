"""Amounts of memory as users write them, and numbers as the estimate prints them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from voxtral_dist.errors import UserError

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_bytes(text: str, option: str) -> int:
    """Bytes of an amount such as `80GB` (80 * 10^9) or `80GiB` (80 * 2^30).

    Args:
        text: a positive number with a unit.
        option: the option that it was given for, named in the error.

    Raises:
        UserError: the text is not a positive number with a unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    size = units.get(match[2].lower(), 0) if match else 0
    if match is None or float(match[1]) * size == 0:
        raise UserError(
            f"`{option}` must be a positive amount of memory with a unit ({', '.join(_UNITS)}), such as 80GB, but is "
            f"{text!r} instead."
        )
    return round(float(match[1]) * size)


def gigabytes(num_bytes: float) -> str:
    """Gigabytes of 10^9 bytes, such as `12.3 GB`; more digits below 1 GB."""
    amount = num_bytes / 1e9
    return f"{amount:.1f} GB" if amount >= 1 else f"{amount:.3f} GB"


def milliseconds(seconds: float) -> str:
    """Milliseconds, such as `245 ms` or `3.1 ms`."""
    amount = 1e3 * seconds
    return f"{amount:.0f} ms" if amount >= 10 else f"{amount:.1f} ms"


def table_lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table: the first column is aligned on the left, all others on the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for first, *others in [heads, *rows]:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *cells])

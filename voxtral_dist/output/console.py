"""Everything that is printed: without secrets, and without control characters that a transcript or a name may hold.

Files keep the original texts, apart from secrets.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress

from voxtral_dist.output.masking import masked

# All control characters but tabs and line feeds, and those that change the direction of what follows.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_PACKAGE = __name__.partition(".")[0]
_LINE_END = re.compile("[\t\n\u2028\u2029]")


def printable(text: str) -> str:
    """A text for a terminal or a log: control characters become `\\uXXXX`, as in JSON, and secrets are masked."""
    return _CONTROL.sub(_escaped, masked(text))


def one_line(text: str) -> str:
    """A text as a part of one line: tabs and line ends become `\\uXXXX` too, so that it cannot forge a line."""
    return _LINE_END.sub(_escaped, text)


# Takes what is said besides the terminal, and whether it is an error.
_copy: Callable[[str, bool], None] | None = None
_is_copied_first = False


def copy_to(copy: Callable[[str, bool], None] | None, *, first: bool = False) -> None:
    """Give what is said to a function too, and whether it is an error; None ends that.

    Args:
        copy: takes each text.
        first: before it is printed, which may not end where the output is a file of storage that does not answer.
    """
    global _copy, _is_copied_first
    _copy, _is_copied_first = copy, first


def copy_line(line: str) -> None:
    """Copy a line that a progress display has printed."""
    if _copy is not None:
        _copy(f"{line}\n", False)


def say(text: object = "", *, to_errors: bool = False, end: str = "\n") -> None:
    """Print a text to standard output, or to standard error."""
    shown = printable(str(text))
    copy, is_first = _copy, _is_copied_first
    if copy is not None and is_first:
        copy(f"{shown}{end}", to_errors)
    print(shown, file=sys.stderr if to_errors else sys.stdout, end=end, flush=True)
    if copy is not None and not is_first:
        copy(f"{shown}{end}", to_errors)


def say_at_once(text: str) -> None:
    """Write a line to standard error from a handler of a signal, which may interrupt `say`."""
    with suppress(OSError):
        os.write(2, f"{printable(text)}\n".encode(errors="backslashreplace"))


def set_up_logging() -> None:
    """Make log messages printable where nobody has configured logging."""
    handler = _Handler(logging.WARNING)
    handler.setFormatter(_PrintableFormatter())
    logging.lastResort = handler


class _Handler(logging.Handler):
    """Says messages of this package, and errors of all others; prints other messages, which each rank repeats."""

    def emit(self, record: logging.LogRecord) -> None:
        is_said = record.levelno >= logging.ERROR or record.name.partition(".")[0] == _PACKAGE
        try:
            if is_said:
                say(self.format(record), to_errors=True)
            else:
                sys.stderr.write(f"{self.format(record)}\n")
                sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"

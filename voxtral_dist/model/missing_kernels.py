"""Messages of torchao and bitsandbytes about kernels that they cannot load, none of which is called here."""

from __future__ import annotations

import logging

# The beginning of the message by the logger that gives it.
_IGNORED = {
    "torchao": "Failed to load ",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit",
}


def ignore_missing_kernels() -> None:
    """Drop these messages, and no others of the two packages. Importing transformers or peft imports them, too."""
    for name, beginning in _IGNORED.items():
        logging.getLogger(name).addFilter(_Except(beginning))


class _Except(logging.Filter):
    """Drops messages that begin with a text."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)

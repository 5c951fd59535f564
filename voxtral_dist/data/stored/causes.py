"""Why an utterance cannot be used, as it is counted."""

from __future__ import annotations

from enum import StrEnum


class Cause(StrEnum):
    """The kinds of bad utterances."""

    NOT_JSON = "not JSON"
    MALFORMED = "malformed row"
    NO_AUDIO = "no audio named"
    UNREADABLE = "unreadable"
    UNDECODABLE = "undecodable"
    EMPTY_AUDIO = "empty audio"
    SILENT = "silent"
    NOT_FINITE = "not finite"
    ABSURD_CLAIM = "absurd claim"
    WRONG_LENGTH = "wrong length"
    EMPTY_TEXT = "empty text"
    TEXT_TOO_LONG = "text too long for its audio"
    NO_INSTRUCTION = "no instruction"
    UNKNOWN_LANGUAGE = "unknown language"
    DAMAGED_TAR = "damaged tar"
    WRONG_INDEX = "differs from its index"


class UnusableError(Exception):
    """An utterance cannot be used; the message goes on after its name."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause

"""Errors a user can fix: a message, no traceback, and a nonzero exit code."""

import os

from voxtral_dist.output.masking import masked


class UserError(Exception):
    """A mistake in the user's input; the message says what is wrong, where, and what to do.

    The command line prints the message and exits with `exit_code`. Only the first process of a node prints it, because
    all of them meet the same mistake. Passwords and tokens in the message are masked.

    Example:
        >>> from voxtral_dist import UserError, read_index
        >>> try:
        ...     read_index(["shards/nowhere"])
        ... except UserError as error:
        ...     print(error)
        The shard folder shards/nowhere does not exist...
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class RankError(UserError):
    """A `UserError` of a single rank, which prints it itself."""

    exit_code = 3


class SharedError(UserError):
    """An error of one rank that was shared with all others: all exit with it, and one per node prints it."""

    exit_code = 3


class WriteError(RankError):
    """Results of one rank that cannot be written: the disk is full or read-only, or the folder is gone."""

    exit_code = 74


class SharedWriteError(SharedError):
    """A `WriteError` that was shared with all ranks: all exit with it, and one per node prints it."""

    exit_code = 74


def is_printed_here(error: UserError) -> bool:
    """Whether this process prints an error: one per node does, because its ranks meet the same mistake."""
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return is_alone or os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, RankError)


def lower_first(text: str) -> str:
    """A library's message with a lowercase first letter, to continue a sentence."""
    return text[:1].lower() + text[1:]


def write_reason(error: BaseException) -> str:
    """Why something could not be written, to continue a sentence."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return lower_first(reason.rstrip("."))


def first_line(error: BaseException) -> str:
    """The first line of a library's error message."""
    return str(error).strip().split("\n", 1)[0]

"""Errors a user can fix: a message, no traceback, and a nonzero exit code."""

import os
from collections.abc import Collection

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


class RetryError(RankError):
    """A `RankError` after which the same command goes on, in another way than before."""

    exit_code = 75


class LostWorkerError(RankError):
    """A data worker of a rank was killed; the same command resumes the run."""

    exit_code = 76


class SharedError(UserError):
    """An error of one rank that was shared with all others: all exit with it, and one per node prints it."""

    exit_code = 3


class LostPeerError(UserError):
    """Ranks that were not heard of: their processes, hosts or network are gone, or were never there.

    The same command resumes the run once they are back. On each host the first rank prints it that is not among them.

    Attributes:
        lost_ranks: those ranks, as far as they are known.
    """

    exit_code = 76

    def __init__(self, message: str, lost_ranks: Collection[int] = ()) -> None:
        super().__init__(message)
        self.lost_ranks = tuple(lost_ranks)


class HangError(UserError):
    """A run in which no rank makes progress; the same command resumes it."""

    exit_code = 77


class WriteError(RankError):
    """Results of one rank that cannot be written: the disk is full or read-only, or the folder is gone."""

    exit_code = 74


class ReadError(UserError):
    """Stored data that cannot be read because its storage fails, and not because of one utterance in it.

    All ranks meet it, so one per node prints it. The same command resumes once the storage works again.
    """

    exit_code = 74


class SharedWriteError(SharedError):
    """A `WriteError` that was shared with all ranks: all exit with it, and one per node prints it."""

    exit_code = 74


def is_printed_here(error: UserError) -> bool:
    """Whether this process prints an error: one per node does, because its ranks meet the same mistake."""
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    lost_ranks = error.lost_ranks if isinstance(error, LostPeerError) else ()
    return is_alone or isinstance(error, RankError) or is_first_on_node(lost_ranks)


def is_first_on_node(lost_ranks: Collection[int] = ()) -> bool:
    """Whether this is the first rank of its node, not counting those that are lost."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    rank = int(os.environ.get("RANK", local_rank))
    return all(before in lost_ranks for before in range(rank - local_rank, rank))


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

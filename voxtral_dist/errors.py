"""The one kind of error that is the user's to mend: a sentence, no traceback, and an exit code that is not 0."""


class UserError(Exception):
    """A mistake in what the user gave: what is wrong, where, and what to do.

    The command line prints the sentence and ends with `exit_code`. Of several processes on a node the first speaks for
    all, because all of them find the same mistake.
    """

    exit_code = 2


class RankError(UserError):
    """A `UserError` that one rank met alone, so that this rank has to print it itself."""

    exit_code = 3


class SharedError(UserError):
    """Met by one rank, which has told all others: each ends with it, and one of a node prints it."""

    exit_code = 3


def lower_first(text: str) -> str:
    """A library's sentence as the second half of one of ours."""
    return text[:1].lower() + text[1:]


def first_line(error: BaseException) -> str:
    """What a library's error says first: the part of it that fits into a sentence of ours."""
    return str(error).strip().split("\n", 1)[0]

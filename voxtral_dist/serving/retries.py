"""When a request to a server is sent again, and when the server is given up."""

from __future__ import annotations

import random
import time
from email.utils import parsedate_to_datetime
from http import HTTPStatus

# A server answers so while it is busy, starting, restarting, or behind a proxy that cannot reach it.
PASSING_STATUSES = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_EARLY,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
_MOST_DOUBLINGS = 6


class Outage:
    """The time since a server last answered any of many requests that are in flight together.

    So a server that refuses most requests, but answers some, is busy; one that answers none is out.
    """

    def __init__(self, limit_seconds: float) -> None:
        """Allow the server to answer nothing for this long."""
        self._limit_seconds = limit_seconds
        self._answered_at = time.monotonic()

    def end(self) -> None:
        """Note that the server answered."""
        self._answered_at = time.monotonic()

    def seconds_left(self, failing_since: float) -> float:
        """How long a request may still be sent again.

        Args:
            failing_since: `time.monotonic()` of its first failure.
        """
        return self._limit_seconds - (time.monotonic() - max(self._answered_at, failing_since))


def pause_seconds(attempt: int, retry_after: str | None) -> float:
    """The pause before a request is sent again.

    Args:
        attempt: how often it has failed, from 1. Pauses double up to half a minute, and are drawn from the upper half
            of their range, so that requests that failed together do not return together.
        retry_after: the header of that name, in seconds or as a date; it goes before.
    """
    asked = _asked_seconds(retry_after)
    if asked is not None:
        return asked
    longest: float = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** min(attempt - 1, _MOST_DOUBLINGS))
    return random.uniform(longest / 2, longest)


def _asked_seconds(retry_after: str | None) -> float | None:
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None

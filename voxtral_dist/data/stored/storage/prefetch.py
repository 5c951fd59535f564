"""Reading ahead: daemon threads, and the results that wait to be taken."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from functools import cache
from queue import SimpleQueue
from typing import Any, NamedTuple

from voxtral_dist.data.stored.storage.spans import Span, is_unreachable

# Adjacent spans are read by one request of up to this size.
_MAX_JOINED_BYTES = 8 << 20


class DaemonPool:
    """A pool of daemon threads. Unlike with `concurrent.futures`, a process that exits doesn't wait for running calls:
    a server that stalls must not delay it."""

    def __init__(self, num_threads: int) -> None:
        self._max_threads = num_threads
        self._num_threads = 0
        self._lock = threading.Lock()
        self._calls: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = SimpleQueue()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Schedule a call and return its future."""
        future: Future[Any] = Future()
        self._calls.put((future, function, arguments))
        with self._lock:
            if self._num_threads < self._max_threads:
                self._num_threads += 1
                threading.Thread(target=self._work, name="voxtral-dist-read", daemon=True).start()
        return future

    def _work(self) -> None:
        while True:
            _run(*self._calls.get())


def _run(future: Future[Any], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function(*arguments)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


@cache
def pool_of_process(num_threads: int, process_id: int) -> DaemonPool:
    """The pool of a process: a forked process gets its own, because threads don't survive a fork."""
    return DaemonPool(num_threads)


class _Piece(NamedTuple):
    future: Future[bytes]
    start: int
    is_joined: bool


class Prefetch:
    """The spans of the latest `start`, in flight or read but not yet taken, up to `max_bytes` in total."""

    def __init__(self, read: Callable[[Span], bytes], pool: DaemonPool, max_bytes: int) -> None:
        self._read = read
        self._pool = pool
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._pieces: dict[Span, _Piece] = {}

    def start(self, spans: Iterable[Span]) -> None:
        """Read these spans ahead; drop earlier ones that are not among them."""
        wanted = _within(spans, self._max_bytes)
        with self._lock:
            pieces = {span: self._pieces[span] for span in wanted if span in self._pieces}
            for group in _adjacent_groups([span for span in wanted if span not in pieces]):
                pieces.update(self._submit(group))
            kept = {id(piece.future) for piece in pieces.values()}
            for piece in self._pieces.values():
                if id(piece.future) not in kept:
                    piece.future.cancel()
            self._pieces = pieces

    def take(self, span: Span) -> bytes | None:
        """The bytes of a span that was read ahead, once they are there; None if it was not, or must be read again.

        Raises:
            StorageError: the read failed.
        """
        with self._lock:
            piece = self._pieces.pop(span, None)
        if piece is None:
            return None
        try:
            contents = piece.future.result()
        except CancelledError:
            return None
        except OSError as error:
            # An adjacent span may have caused it, unless all attempts to reach the storage failed.
            if piece.is_joined and not is_unreachable(error):
                return None
            raise
        return contents[piece.start : piece.start + span.num_bytes] if piece.is_joined else contents

    def _submit(self, group: list[Span]) -> Iterator[tuple[Span, _Piece]]:
        first = group[0]
        whole = Span(first.location, first.offset, sum(span.num_bytes for span in group))
        future = self._pool.submit(self._read, whole)
        for span in group:
            yield span, _Piece(future, span.offset - first.offset, len(group) > 1)


def _within(spans: Iterable[Span], max_bytes: int) -> list[Span]:
    chosen = []
    for span in dict.fromkeys(spans):
        max_bytes -= span.num_bytes
        if max_bytes < 0:
            break
        chosen.append(span)
    return chosen


def _adjacent_groups(spans: list[Span]) -> list[list[Span]]:
    """Groups of spans that are adjacent in one file, in the order in which they are needed."""
    order = {span: number for number, span in enumerate(spans)}
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (span.location, span.offset)):
        if groups and _follows(span, groups[-1]):
            groups[-1].append(span)
        else:
            groups.append([span])
    return sorted(groups, key=lambda group: min(order[span] for span in group))


def _follows(span: Span, group: list[Span]) -> bool:
    last = group[-1]
    return (
        span.location == last.location
        and span.offset == last.offset + last.num_bytes
        and span.offset + span.num_bytes - group[0].offset <= _MAX_JOINED_BYTES
    )

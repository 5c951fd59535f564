"""The failure of one rank, made known to all others, whatever they are waiting for."""

from __future__ import annotations

import atexit
import json
import math
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # public classes all the same

from voxtral_dist.distributed.heartbeats import SILENT_SECONDS, Heartbeats, loss_of_store, vain_wait
from voxtral_dist.distributed.nccl import failed_collective
from voxtral_dist.errors import LostPeerError, UserError, first_line, is_first_on_node, is_printed_here
from voxtral_dist.output.console import one_line, say

_POLL_SECONDS = 1.0
# Between two looks for ranks that are silent.
_LOOK_SECONDS = 10.0
# How long rank 0, whose process may host the store, waits until all others know why it ends.
_STORE_SECONDS = 5.0
# How long a rank waits until all others have printed what they print.
_PRINTING_SECONDS = 8.0
# The same after the loss of some, if others are lost too.
_PRINTING_SECONDS_AFTER_LOSS = 3.0
# Standard error that nobody reads, or a store that does not answer, must not keep a process.
_LONGEST_END_SECONDS = 10.0

_FIRST_FAILURE = "first"
_NUM_INFORMED = "informed"
_NUM_PRINTED, _NUM_LEAVING = "printed", "leaving"


@dataclass(frozen=True)
class Failure:
    """Why a rank ended the run.

    Attributes:
        rank: the rank that failed.
        host: the name of its host.
        exit_code: of all ranks.
        message: a message for the user, or an exception's type and first line.
        is_unexpected: whether `message` is an exception's, so that the rank prints a traceback.
        is_printed: whether that rank prints `message` itself.
        lost_ranks: the ranks that are gone, if this is why.
    """

    rank: int
    host: str
    exit_code: int
    message: str
    is_unexpected: bool
    is_printed: bool
    lost_ranks: Sequence[int] = ()

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        """The failure of a rank that an exception ends."""
        host = socket.gethostname()
        match error:
            case UserError():
                lost_ranks = error.lost_ranks if isinstance(error, LostPeerError) else ()
                return cls(rank, host, error.exit_code, str(error), False, is_printed_here(error), lost_ranks)
            case KeyboardInterrupt():
                return cls(rank, host, 130, "The run was interrupted from the keyboard.", False, True)
            case _:
                message = f"{type(error).__name__}: {first_line(error)}".rstrip(": ")
                return cls(rank, host, 1, message, is_unexpected=True, is_printed=False)

    def line_elsewhere(self, host: str) -> str | None:
        """What a node prints once for a failure of another process; None where that process prints it itself."""
        if self.is_unexpected:
            return (
                f"Rank {self.rank} on {self.host} ended with an unexpected error, {self.message} (the traceback is in "
                "that rank's output)"
            )
        if self.host != host:
            return f"{self.message} (rank {self.rank} on {self.host})"
        return None if self.is_printed else self.message


@contextmanager
def shared_failures(
    store: Store, rank: int, size: int, limit_seconds: float = math.inf, neighbour: int | None = None
) -> Iterator[None]:
    """Tell all ranks if this one fails in the context; end this process there if another rank fails or is gone.

    Args:
        store: of all ranks.
        rank: of this process.
        size: number of ranks.
        limit_seconds: how long a rank may give no sign of life.
        neighbour: a rank of the same node, whose process this one looks at; None for none.
    """
    if size == 1:
        yield
        return
    global _newest_end, _newest_watch
    _newest_end = end = CommonEnd(store, rank, size)
    _newest_watch = watch = FailureWatch(store, rank, size, end, limit_seconds, neighbour)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        watch.report(error)
        # Where no command line catches the error, Python prints it before this.
        atexit.register(end.wait)
        raise
    except BaseException:
        watch.leave()
        raise
    finally:
        _newest_watch = None
    watch.leave()


class CommonEnd:
    """The end of all ranks of a world: none may exit before each of them has printed what it prints.

    Launchers end the ranks of a node as soon as one of them has ended with an error, so a rank that has nothing to
    print could keep another one from its message.

    Attributes:
        num_expected: number of ranks that are not known to be lost.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        """All ranks construct it, with the same store."""
        self._store = PrefixStore("end", store.clone())  # type: ignore[attr-defined]  # missing in torch's stubs
        self._rank = rank
        self._size = size
        self.num_expected = size
        self._seconds = _PRINTING_SECONDS
        self._have_all_printed = False
        self._waiting: threading.Thread | None = None

    def lose(self, lost_ranks: Sequence[int]) -> None:
        """Wait for those ranks no longer, and for others that are lost too only shortly."""
        self.num_expected = self._size - len(lost_ranks)
        self._seconds = _PRINTING_SECONDS_AFTER_LOSS

    def wait(self) -> bool:
        """Say that this rank has printed everything, and wait for the others; of several calls, only the first waits.

        Returns:
            Whether all ranks have printed; false if one is killed, cannot answer, or is some seconds late.
        """
        if self._waiting is None:
            self._waiting = threading.Thread(target=self._meet, name="common-end", daemon=True)
            self._waiting.start()
        # A store whose host is gone may never answer.
        self._waiting.join(self._seconds + 1.0)
        return self._have_all_printed

    def _meet(self) -> None:
        deadline = time.monotonic() + self._seconds
        # An error of the store: its host was killed.
        with suppress(RuntimeError):
            self._have_all_printed = self._reaches(_NUM_PRINTED, self.num_expected, deadline)
            # Rank 0, which may host the store, leaves last.
            self._reaches(_NUM_LEAVING, self.num_expected if self._rank == 0 else 0, deadline)

    def _reaches(self, key: str, number: int, deadline: float) -> bool:
        """Add one to a counter, and wait until it has reached a number, or until the deadline."""
        self._store.add(key, 1)
        while self._store.add(key, 0) < number:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


# Of the world that this process has joined last.
_newest_end: CommonEnd | None = None


# The failure watch of that world, as long as the process is in it.
_newest_watch: FailureWatch | None = None


def newest_end() -> CommonEnd | None:
    """The end of the world that this process has joined last; None if it has joined none, or is alone in it."""
    return _newest_end


def watch_also(look: Callable[[Store], Failure | None] | None) -> None:
    """Let the failure watch of this process's newest world call a function at each poll; None ends that.

    Args:
        look: takes the store of the watch, and returns a failure that ends all ranks, or None.
    """
    if _newest_watch is not None:
        _newest_watch.look = look


class FailureWatch:
    """A thread that polls the ranks' store once a second, and ends this process if another rank has failed.

    It ends the process whatever the main thread waits for: a kernel of NCCL, a collective, a store, a data worker. A
    rank that is killed writes nothing: a rank of its node sees that its process is gone, rank 0 misses its signs of
    life, and the others miss rank 0's store.

    Attributes:
        heard_at: when the store last answered, by `time.monotonic`.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        end: CommonEnd,
        limit_seconds: float = math.inf,
        neighbour: int | None = None,
    ) -> None:
        """Start watching.

        Args:
            store: all ranks' store. The watch has a connection of its own, because one may wait for an answer for long.
            rank: of this process.
            size: number of ranks.
            end: of all ranks.
            limit_seconds: how long a rank may give no sign of life.
            neighbour: a rank of the same node, whose process this one looks at; None for none.
        """
        self._limit_seconds = limit_seconds
        # Before NCCL's own watchdog ends the process without a sentence.
        self._silent_limit_seconds = 0.9 * limit_seconds
        self.heard_at = time.monotonic()
        self._has_first_left = False
        self._next_look = 0.0
        self._failed_at: float | None = None
        self._store = PrefixStore("failures", store.clone())  # type: ignore[attr-defined]  # missing in torch's stubs
        self._rank = rank
        self._size = size
        self._common_end = end
        self._own: Failure | None = None
        self.look: Callable[[Store], Failure | None] | None = None
        self._wake = threading.Event()
        self._done = threading.Event()
        self._ending = threading.Lock()
        self._beats = Heartbeats(self._store, rank, size, neighbour)
        if rank != 0:
            threading.Thread(target=self._watch_store, name="store-watch", daemon=True).start()
        threading.Thread(target=self._watch, name="failure-watch", daemon=True).start()

    def report(self, error: BaseException) -> None:
        """Tell all ranks that this one ends with an error, and wait up to some seconds until they know.

        If another rank's failure is ending this process already, this does not return.
        """
        self._ending.acquire()
        self._own = Failure.of(error, self._rank)
        if isinstance(error, LostPeerError):
            self._common_end.lose(error.lost_ranks)
        self._stop()

    def leave(self) -> None:
        """Stop watching, because this rank has finished. Rank 0, which may host the store, waits for the others."""
        self._stop()

    def _stop(self) -> None:
        self._wake.set()
        self._done.wait(_LONGEST_END_SECONDS)

    def _watch(self) -> None:
        # An error of the store: its host has left.
        with suppress(RuntimeError):
            try:
                # At once: a rank that is lost before its first sign of life would not be missed.
                self._beats.beat()
                while not self._wake.wait(_POLL_SECONDS):
                    self._look()
            except RuntimeError:
                # The main thread may be about to say so itself.
                self._wake.wait(SILENT_SECONDS)
                self._end_without_store()
                raise
            if self._own is not None:
                self._store.compare_set(_FIRST_FAILURE, "", json.dumps(asdict(self._own)))
            self._confirm()
        self._done.set()

    def _look(self) -> None:
        self._beats.beat()
        self.heard_at = time.monotonic()
        # The store may go with it, while this rank still has its own work to do.
        self._has_first_left = self._beats.has_left(0)
        if self._beats.is_neighbour_gone():
            self._share(self._loss(self._beats.loss_of_neighbour()))
        self._refuse_silent()
        self._refuse_failed_collective()
        found = None if self.look is None else self.look(self._store)
        if found is not None:
            self._share(found)
        if self._store.check([_FIRST_FAILURE]):
            failure = Failure(**json.loads(self._store.get(_FIRST_FAILURE)))
            if self._ending.acquire(blocking=False):
                self._end(failure)

    def _refuse_silent(self) -> None:
        """End the run, on ranks 0 and 1, for ranks that have come, and give no sign of life."""
        now = time.monotonic()
        # Two, because torchrun's store outlives rank 0.
        if self._rank > 1 or now < self._next_look or math.isinf(self._limit_seconds):
            return
        # Not at every poll, because it asks for each of perhaps thousands.
        self._next_look = now + min(_LOOK_SECONDS, self._silent_limit_seconds / 4)
        lost = self._beats.lost(self._silent_limit_seconds)
        if lost:
            self._share(self._loss(self._beats.loss(lost)))

    def _refuse_failed_collective(self) -> None:
        """End the run for a collective of NCCL that has failed, after looking for some seconds for who is gone."""
        error = failed_collective()
        if error is None:
            return
        now = time.monotonic()
        self._failed_at = self._failed_at or now
        lost = self._beats.lost(SILENT_SECONDS)
        if lost:
            self._share(self._loss(self._beats.loss(lost)))
        elif now - self._failed_at > SILENT_SECONDS:
            self._share(self._loss(vain_wait(self._rank, f"NCCL: {error}", self._limit_seconds)))

    def _share(self, failure: Failure) -> None:
        self._store.compare_set(_FIRST_FAILURE, "", json.dumps(asdict(failure)))

    def _loss(self, error: LostPeerError) -> Failure:
        """The loss of others, which no main thread prints."""
        return replace(Failure.of(error, self._rank), is_printed=False)

    def _watch_store(self) -> None:
        """End this process if rank 0's store does not answer for too long; a call of it may block for ever."""
        while not self._wake.wait(_POLL_SECONDS):
            if time.monotonic() - self.heard_at > self._silent_limit_seconds:
                self._end_without_store()

    def _end_without_store(self) -> None:
        """End this process because the store is gone, unless one of this rank and rank 0 has finished."""
        if not (self._wake.is_set() or self._has_first_left) and self._ending.acquire(blocking=False):
            self._end(self._loss(loss_of_store(time.monotonic() - self.heard_at)), has_store=False)

    def _confirm(self) -> None:
        """Say that this rank knows, or has finished; rank 0 waits for all others. None uses the store later."""
        deadline = time.monotonic() + _STORE_SECONDS
        self._beats.leave()
        self._store.add(_NUM_INFORMED, 1)
        if self._rank == 0:
            while self._store.add(_NUM_INFORMED, 0) < self._common_end.num_expected and time.monotonic() < deadline:
                time.sleep(0.1)

    def _end(self, failure: Failure, *, has_store: bool = True) -> None:
        """End this process without destructors, which may wait for kernels that never end."""
        limit = threading.Timer(_LONGEST_END_SECONDS, os._exit, [failure.exit_code])
        limit.daemon = True
        limit.start()
        line = failure.line_elsewhere(socket.gethostname())
        if failure.exit_code == LostPeerError.exit_code:
            self._common_end.lose(failure.lost_ranks)
        with suppress(Exception):
            if line is not None and is_first_on_node(failure.lost_ranks):
                say(f"voxtral-dist: error: {one_line(line)}", to_errors=True)
            sys.stdout.flush()
            if has_store:
                self._store.add(_NUM_INFORMED, 1)
                self._common_end.wait()
        with suppress(Exception):
            for child in multiprocessing.active_children():
                child.kill()
        os._exit(failure.exit_code)


def heard_seconds_ago() -> float:
    """Seconds since this process last heard from the ranks' store; 0 where there are no other ranks."""
    return 0.0 if _newest_watch is None else time.monotonic() - _newest_watch.heard_at

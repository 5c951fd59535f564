"""A parallel `map` over processes that keeps the order of its inputs and holds few results in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import forkserver
from multiprocessing.connection import wait
from typing import TypeVar

from voxtral_dist.errors import UserError

Input = TypeVar("Input")
Result = TypeVar("Result")

# Sending a batch to a worker costs about as much as decoding one second of audio.
BATCH_SIZE = 8
_BATCHES_IN_FLIGHT_PER_WORKER = 3
# Imported once, by the server that forks the workers: these imports take more than a second.
_PRELOADED = [
    "voxtral_dist.shards.packed_utterance",
    "voxtral_dist.shards.indexing",
    "voxtral_dist.shards.verification",
    "voxtral_dist.shards.contents",
]


def ordered_map(
    function: Callable[[Input], Result],
    inputs: Iterable[Input],
    num_workers: int,
    batch_size: int = BATCH_SIZE,
) -> Generator[Result, None, None]:
    """`map(function, inputs)` in `num_workers` processes; in this process if that is 1 or there is a single batch.

    The workers end when the iteration ends or is closed, on Ctrl-C, and when this process dies.

    Raises:
        UserError: a worker was killed, usually because memory ran out.
    """
    batches = _batches(inputs, batch_size)
    first = list(islice(batches, 2))
    if num_workers == 1 or len(first) < 2:
        yield from map(function, chain.from_iterable(chain(first, batches)))
        return
    executor = ProcessPoolExecutor(num_workers, _fork_server(), _prepare_worker)
    try:
        yield from _results(executor, function, chain(first, batches), num_workers)
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process was killed, probably because memory ran out: rerun the same command with fewer --workers."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _results(
    executor: ProcessPoolExecutor,
    function: Callable[[Input], Result],
    batches: Iterator[list[Input]],
    num_workers: int,
) -> Iterator[Result]:
    waiting: deque[Future[list[Result]]] = deque()
    for batch in batches:
        waiting.append(executor.submit(_apply, function, batch))
        if len(waiting) >= _BATCHES_IN_FLIGHT_PER_WORKER * num_workers:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _batches(inputs: Iterable[Input], batch_size: int) -> Iterator[list[Input]]:
    iterator = iter(inputs)
    while batch := list(islice(iterator, batch_size)):
        yield batch


def _apply(function: Callable[[Input], Result], batch: Sequence[Input]) -> list[Result]:
    return [function(one) for one in batch]


def _fork_server() -> multiprocessing.context.ForkServerContext:
    """A fork server, which has no threads: a fork of this process, whose libraries have threads, may hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # Ctrl-C reaches the whole process group. Workers inherit from the server that they ignore it.
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    try:
        forkserver.ensure_running()
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
    return context


def _prepare_worker() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker with its parent: it would wait forever for a batch that nobody sends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)

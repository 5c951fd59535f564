"""The end of a run in which no rank makes progress, with the stacks of all threads of all ranks.

Three parts work together, because each may be kept from working. A thread of each rank compares the time since the
rank's last place with its limit. The failure watch, which has the store, shares the ranks' places, judges them and ends
them all. A timer of faulthandler, which needs no lock of Python, ends a rank whose lock is held.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.distributed import Store  # type: ignore[attr-defined]  # a public class all the same

from voxtral_dist.distributed.failures import Failure, watch_also
from voxtral_dist.distributed.stacks import (
    Activity,
    Doing,
    activity,
    native_stacks,
    process_state,
    write_native_stacks,
    write_python_stacks,
)
from voxtral_dist.distributed.standing import Standing, here
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import HangError
from voxtral_dist.output.console import one_line, say
from voxtral_dist.output.counting import counted

_TICK_SECONDS = 1.0
# A thread that sleeps this much longer than it should was stopped with its process.
_STOPPED_SECONDS = 5.0
# Python's lock may be held so much longer than the limit, until the others have written where they stand.
_LOCK_SECONDS = 30.0
# Ranks publish their places this often; one that does not for three times as long is silent.
_PUBLISH_SECONDS = 2.0
_SILENT_SECONDS = 3 * _PUBLISH_SECONDS
# How long the store of a living rank may take to answer.
_STORE_SECONDS = 60.0
# How long the judge waits for the stacks of all ranks that are not silent; the others wait twice as long for the judge.
_STACKS_SECONDS = 45.0
# Storage that has not taken Python's stacks in this time is not waited for.
_STORAGE_SECONDS = 10.0
# Ranks beyond these judge later, where both of them are silent.
_NUM_JUDGES, _LATER = 2, 1.5
_LONGEST_END_SECONDS = 10.0
_NUM_NAMED = 8

# What one rank does, and several; a GPU's kernels and collectives are in no frame.
_DOING: dict[Doing, tuple[str, str]] = {
    "data": ("waits for its data workers", "wait for their data workers"),
    "other": ("is in {}", "are in {}"),
    "collective": ("waits for other ranks in {}", "wait for other ranks in {}"),
}
_ORDER = list(_DOING)

_HANG = "hang"
_FOLDER = "hangs"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """Where a rank stands, as the others read it.

    beat: differs from the last report. is_stalled: whether the rank has been at its place for longer than its limit.
    doing, function: see `stacks.Activity`.
    """

    rank: int
    host: str
    process: int
    beat: int
    phase: str
    step: int | None
    slot: int | None
    keys: tuple[str, ...]
    seconds: float
    is_stalled: bool
    doing: Doing = "other"
    function: str = ""

    @property
    def place(self) -> str:
        """Where in the run, such as `step 12, slot 3`."""
        parts = [
            f"{what} {number}" for what, number in (("step", self.step), ("slot", self.slot)) if number is not None
        ]
        return ", ".join([self.phase, *parts] if self.phase not in ("data", "step") or not parts else parts)

    def __str__(self) -> str:
        return _doing([self])


class Watchdog:
    """Ends the run if no rank makes progress; a context. All ranks open it together."""

    def __init__(self, run_dir: Path, floor: float | None, world: World, standing: Standing | None = None) -> None:
        """Watch nothing yet.

        Args:
            run_dir: stacks are written to `hangs/` in it.
            floor: seconds without progress that are always allowed; None disables the watchdog.
            world: all ranks.
            standing: of this process.
        """
        self._folder = run_dir / _FOLDER
        self._floor = math.inf if floor is None else floor
        self._world = world
        self._standing = here() if standing is None else standing
        self._done = threading.Event()
        self._lock_file: TextIOWrapper | None = None
        self._beat = 0
        self._answered = time.monotonic()
        self._next_publication = self._next_look = 0.0
        self._first_look: tuple[float, dict[int, Report]] | None = None
        self._is_judge = False
        self._stacks: _Stacks | None = None
        self._is_reported = False

    def __enter__(self) -> Self:
        if math.isfinite(self._floor):
            self._open_lock_file()
            if self._world.size > 1:
                watch_also(self._look)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        watch_also(None)
        faulthandler.cancel_dump_traceback_later()
        if self._lock_file is not None:
            with suppress(OSError):
                self._lock_file.close()
                if error is None:
                    # Storage that does not answer may be the cause of an error.
                    self._lock_path.unlink()
                    # Fails where hangs were written, or another rank has not ended yet.
                    self._folder.rmdir()

    # The thread that needs no store.

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._done.wait(_TICK_SECONDS):
            now = time.monotonic()
            if now - last > _TICK_SECONDS + _STOPPED_SECONDS:
                self._standing.excuse(now - last)
            last = now
            limit = self._standing.limit(self._floor)
            self._expect(limit)
            if self._standing.age() <= limit:
                continue
            if self._world.size == 1:
                self._end_alone("alone", "")
            elif now - self._answered > _STORE_SECONDS and not self._is_judged(now):
                host = os.environ.get("MASTER_ADDR", "its host")
                self._end_alone("no-store", f"Rank 0, which keeps the ranks together, does not answer on {host}. ")

    def _is_judged(self, now: float) -> bool:
        """Whether the failure watch is about to end this process."""
        longest = 2 * _STACKS_SECONDS + _LONGEST_END_SECONDS
        return self._stacks is not None and now - self._stacks.began_at < longest

    def _expect(self, limit: float) -> None:
        """Let faulthandler's own thread end this process if this one does not come back in time.

        Then somebody holds Python's lock. It can do no more than write the stacks, and exit with code 1.
        """
        if self._done.is_set() or self._stacks is not None or math.isinf(limit):
            faulthandler.cancel_dump_traceback_later()
        else:
            file = self._lock_file or sys.stderr
            faulthandler.dump_traceback_later(limit + _LOCK_SECONDS, exit=True, file=file)

    def _open_lock_file(self) -> None:
        """Open the file for faulthandler's thread, which cannot open any; keep what it wrote to the last one."""
        self._lock_path = self._folder / f"lock-{self._world.rank:05d}.txt"
        header = f"Rank {self._world.rank}, if Python's lock was held for too long:\n"
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            if self._lock_path.exists() and self._lock_path.stat().st_size > len(header):
                self._lock_path.rename(self._lock_path.with_stem(f"{self._lock_path.stem}-{_now()}"))
            self._lock_file = self._lock_path.open("w", encoding="utf-8")
            self._lock_file.write(header)
            self._lock_file.flush()

    def _end_alone(self, name: str, why: str) -> None:
        """End this process without a word to others: there are none, or they cannot be reached."""
        limit = threading.Timer(_STACKS_SECONDS + _LONGEST_END_SECONDS, os._exit, [HangError.exit_code])
        limit.daemon = True
        limit.start()
        faulthandler.cancel_dump_traceback_later()
        report = self._report()
        folder = self._folder / _folder_name(report, name)
        stacks = _Stacks(folder, report, [], {})
        while not stacks.is_over():
            time.sleep(0.05)
        # Also where stacks cannot be written.
        with suppress(Exception):
            sentence = _sentence([report], [], self._floor, folder, is_taken=stacks.is_taken)
            say(f"voxtral-dist: error: {one_line(why + sentence)}", to_errors=True)
            sys.stdout.flush()
            for child in multiprocessing.active_children():
                child.kill()
        os._exit(HangError.exit_code)

    # Called by the failure watch, once a second.

    def _look(self, store: Store) -> Failure | None:
        """Publish where this rank stands, and what it does if the run hangs; the failure, if this rank has judged."""
        try:
            return self._looked(store)
        except (OSError, LookupError, TypeError, ValueError):
            # The failure watch has more to do.
            log.exception("the watchdog of rank %d", self._world.rank)
            return None

    def _looked(self, store: Store) -> Failure | None:
        now = time.monotonic()
        self._answered = now
        if now >= self._next_publication:
            self._next_publication = now + _PUBLISH_SECONDS
            self._publish(store, self._report())
        if store.check([_HANG]):
            return self._after_judgement(store)
        age, limit = self._standing.age(), self._standing.limit(self._floor)
        if age > limit * (1.0 if self._world.rank < _NUM_JUDGES else _LATER):
            self._judge(store, now)
        else:
            self._first_look = None
        return None

    def _judge(self, store: Store, now: float) -> None:
        """Ask all ranks for their stacks, unless one of them makes progress.

        A rank whose report does not change in some seconds is silent: it is stopped or gone, or its lock is held.
        """
        if now < self._next_look:
            return
        self._next_look = now + _PUBLISH_SECONDS
        reports = self._reports(store)
        if self._first_look is None:
            self._first_look = now, reports
        since, before = self._first_look
        if any(not report.is_stalled and report != before.get(rank) for rank, report in reports.items()):
            self._first_look = None
            return
        if now - since < _SILENT_SECONDS:
            return
        silent = [
            rank
            for rank in range(self._world.size)
            if rank != self._world.rank and reports.get(rank) == before.get(rank)
        ]
        if any(not report.is_stalled for rank, report in reports.items() if rank not in silent):
            return
        folder = _folder_name(self._report(), "")
        request = json.dumps([folder, silent])
        if store.compare_set(_HANG, "", request).decode() == request:
            self._is_judge = True

    def _after_judgement(self, store: Store) -> Failure | None:
        name, silent = json.loads(store.get(_HANG))
        folder = self._folder / name
        if self._stacks is None:
            self._stacks = _Stacks(folder, self._report(), silent, self._reports(store) if silent else {})
            faulthandler.cancel_dump_traceback_later()
        waited = time.monotonic() - self._stacks.began_at
        if not self._is_reported and self._stacks.is_over():
            self._is_reported = True
            store.set(_stack_key(self._world.rank), json.dumps(asdict(self._stacks.report)))
        if not self._is_judge and waited < 2 * _STACKS_SECONDS:
            return None
        expected = [rank for rank in range(self._world.size) if rank not in silent]
        missing = [rank for rank in expected if not store.check([_stack_key(rank)])]
        if missing and waited < _STACKS_SECONDS:
            return None
        found = [_report_of(store.get(_stack_key(rank))) for rank in expected if rank not in missing]
        lost = [self._reports(store).get(rank) or _unknown(rank) for rank in [*silent, *missing]]
        is_taken = self._stacks.is_taken
        if is_taken:
            with suppress(OSError):
                (folder / "ranks.json").write_text(
                    json.dumps(
                        {"ranks": [asdict(one) for one in found], "silent": [asdict(one) for one in lost]}, indent=1
                    )
                )
        sentence = _sentence(found, lost, self._floor, folder, is_taken=is_taken)
        return Failure(
            self._world.rank,
            socket.gethostname(),
            HangError.exit_code,
            sentence,
            is_unexpected=False,
            is_printed=False,
            lost_ranks=[one.rank for one in lost],
        )

    def _reports(self, store: Store) -> dict[int, Report]:
        ranks = list(range(self._world.size))
        if not store.check([_place_key(rank) for rank in ranks]):
            ranks = [rank for rank in ranks if store.check([_place_key(rank)])]
        return {rank: _report_of(value) for rank, value in zip(ranks, _values(store, ranks), strict=True)}

    def _publish(self, store: Store, report: Report) -> None:
        store.set(_place_key(self._world.rank), json.dumps(asdict(report)))

    def _report(self) -> Report:
        self._beat += 1
        place, age = self._standing.place, self._standing.age()
        is_stalled = age > self._standing.limit(self._floor)
        doing, function = activity() if is_stalled else Activity("other", "")
        return Report(
            rank=self._world.rank,
            host=socket.gethostname(),
            process=os.getpid(),
            beat=self._beat,
            phase=place.phase,
            step=place.step,
            slot=place.slot,
            keys=place.keys[:_NUM_NAMED],
            seconds=round(age, 1),
            is_stalled=is_stalled,
            doing=doing,
            function=function,
        )


class _Stacks:
    """What a rank writes about a hang, by a thread of its own: storage that does not answer must stop no other one.

    report: of this rank. began_at: the time by `time.monotonic`.
    """

    def __init__(self, folder: Path, report: Report, silent: Sequence[int], reports: Mapping[int, Report]) -> None:
        """Begin to write.

        Args:
            folder: of the hang.
            report: of this rank.
            silent: ranks that give no sign of life.
            reports: the last one of each rank; empty where none is silent.
        """
        self.report = report
        self.began_at = time.monotonic()
        self._folder = folder
        self._silent = silent
        self._reports = reports
        self._is_taken = threading.Event()
        self._thread = threading.Thread(target=self._write, name="stacks", daemon=True)
        self._thread.start()

    @property
    def is_taken(self) -> bool:
        """Whether the storage has taken Python's stacks."""
        return self._is_taken.is_set()

    def is_over(self) -> bool:
        """Whether all is written, or nothing more will be."""
        is_late = time.monotonic() - self.began_at > _STORAGE_SECONDS
        return not self._thread.is_alive() or (is_late and not self.is_taken)

    def _write(self) -> None:
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / _file_name(self.report.rank)).open("w", encoding="utf-8") as file:
                file.write(
                    f"{_upper_first(str(self.report))}, since {self.report.seconds:.0f} s (process "
                    f"{self.report.process}).\nUtterances: {', '.join(self.report.keys) or 'none'}\n\n"
                )
                write_python_stacks(file)
                self._is_taken.set()
                write_native_stacks(file)
            self._write_silent()

    def _write_silent(self) -> None:
        """Write what the system knows of silent ranks of this host: one of its other ranks does."""
        host = socket.gethostname()
        neighbours = [rank for rank, one in self._reports.items() if one.host == host and rank not in self._silent]
        for rank in self._silent if neighbours[:1] == [self.report.rank] else []:
            if rank in self._reports and self._reports[rank].host == host:
                process = self._reports[rank].process
                text = f"Rank {rank} on {host} is silent ({self._reports[rank].place}).\n{process_state(process)}\n"
                text += f"\n{native_stacks(process) or 'Install py-spy for stacks of processes that do not answer.'}\n"
                (self._folder / _file_name(rank)).write_text(text, encoding="utf-8")


def _sentence(found: Sequence[Report], silent: Sequence[Report], floor: float, folder: Path, *, is_taken: bool) -> str:
    """What is known of a hang, with the ranks first that others may wait for.

    is_taken: whether the storage of the folder has taken stacks.
    """
    seconds = max((report.seconds for report in found), default=floor)
    groups: dict[tuple[Doing, str, str], list[Report]] = {}
    for report in found:
        groups.setdefault((report.doing, report.function, report.place), []).append(report)
    # The odd ones out are the cause, where there are any.
    ordered = sorted(groups.values(), key=lambda ranks: (_ORDER.index(ranks[0].doing), len(ranks), ranks[0].rank))
    give = "gives" if len(silent) == 1 else "give"
    parts = [f"{_ranks(silent)} ({silent[0].place}) {give} no sign of life"] if silent else []
    parts += [_doing(ranks) for ranks in ordered]
    more = [f"and {counted(len(parts) - _NUM_NAMED, 'more group')} of ranks"] if len(parts) > _NUM_NAMED else []
    where = f"Stacks of all threads are in {folder}" if is_taken else f"Stacks could not be written to {folder}"
    return (
        f"No rank has made progress for {seconds:.0f} s (`distributed.watchdog_seconds`), so the run ends: "
        f"{'; '.join([*parts[:_NUM_NAMED], *more])}. {where}. Rerun the same command to resume."
    )


def _doing(reports: Sequence[Report]) -> str:
    """Where some ranks stand, and what all of them do."""
    first = reports[0]
    return f"{_ranks(reports)} ({first.place}) {_DOING[first.doing][len(reports) > 1].format(first.function)}"


def _ranks(reports: Sequence[Report]) -> str:
    if len(reports) == 1:
        return f"rank {reports[0].rank} on {reports[0].host}"
    numbers = [report.rank for report in reports]
    shown = ", ".join(map(str, numbers[:_NUM_NAMED])) + (", ..." if len(numbers) > _NUM_NAMED else "")
    return f"{counted(len(numbers), 'rank')} ({shown})"


def _folder_name(report: Report, suffix: str) -> str:
    step = "start" if report.step is None else f"step-{report.step:07d}"
    # Without the store, ranks do not agree on a time.
    return f"{step}-{suffix or _now()}"


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.txt"


def _now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")


def _values(store: Store, ranks: Sequence[int]) -> list[bytes]:
    values: list[bytes] = store.multi_get([_place_key(rank) for rank in ranks]) if ranks else []
    return values


def _report_of(value: bytes) -> Report:
    fields = json.loads(value)
    return Report(**fields | {"keys": tuple(fields["keys"])})


def _unknown(rank: int) -> Report:
    return Report(rank, "an unknown host", 0, 0, "start", None, None, (), 0.0, is_stalled=True)


def _upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _place_key(rank: int) -> str:
    return f"place-{rank}"


def _stack_key(rank: int) -> str:
    return f"stacks-{rank}"

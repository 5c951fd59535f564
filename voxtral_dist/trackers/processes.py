"""The followers of a run as rank 0 starts and ends them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from voxtral_dist.config import TrackerKind
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import UserError
from voxtral_dist.trackers.tracker import FOLDER, TITLES

# Of all followers together, at the end of a run; what is left then is sent when the run is resumed.
END_SECONDS = 30.0


def refuse_missing_trackers(kinds: Sequence[TrackerKind]) -> None:
    """Refuse trackers without their packages; all ranks meet the same.

    Raises:
        UserError: a package is missing.
    """
    missing = [kind for kind in kinds if find_spec(kind) is None]
    if missing:
        raise UserError(
            f"`metrics.trackers` needs the package {' and '.join(missing)}: install it by `pip install "
            f"'voxtral-dist[{','.join(missing)}]'`, or leave {' and '.join(missing)} out."
        )


@contextmanager
def followed_by_trackers(
    run_dir: Path, kinds: Sequence[TrackerKind], world: World, say: Callable[[str], None]
) -> Iterator[None]:
    """Let a process for each tracker follow the metrics of a run until the context ends; on rank 0 only.

    At the end they get `END_SECONDS` to send what is left. They outlive a run that fails or is killed for some minutes,
    for the same reason; nobody waits for them.
    """
    if not world.is_first or not kinds:
        yield
        return
    followers = {kind: _start(kind, run_dir) for kind in kinds}
    try:
        yield
    except BaseException:
        for follower in followers.values():
            _close(follower, b"")
        raise
    for follower in followers.values():
        # A byte, because data workers that were forked later hold the pipe open too.
        _close(follower, b"e")
    deadline = time.monotonic() + END_SECONDS
    for kind, follower in followers.items():
        if not _has_sent_all(follower, deadline):
            say(
                f"{TITLES[kind]} did not get everything: see {run_dir / FOLDER / kind}.log. The next start of the run, "
                f"or `python -m voxtral_dist.trackers {kind} {run_dir} < /dev/null`, sends the rest."
            )


def _start(kind: TrackerKind, run_dir: Path) -> subprocess.Popen[bytes]:
    # A group of its own: signals to that of the launcher are for ranks.
    return subprocess.Popen(
        [sys.executable, "-m", "voxtral_dist.trackers", kind, str(run_dir.absolute())],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def _close(follower: subprocess.Popen[bytes], last: bytes) -> None:
    assert follower.stdin is not None
    with suppress(OSError):
        follower.stdin.write(last)
        follower.stdin.close()


def _has_sent_all(follower: subprocess.Popen[bytes], deadline: float) -> bool:
    try:
        return follower.wait(max(0.0, deadline - time.monotonic())) == 0
    except subprocess.TimeoutExpired:
        follower.kill()
        follower.wait()
        return False

"""Copies of a run's checkpoints at a URL, from which it resumes on a machine with an empty disk.

URL/
    step-0000100/         the files of a checkpoint; `complete.json` is written last, after all others were read back
    evaluations/step-*/   results
    metrics.jsonl, best.json
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

import xxhash

from voxtral_dist.checkpoints.complete import COMPLETE, DamageError, StoredFile, read_complete
from voxtral_dist.checkpoints.directory import checkpoint_folder, newest_intact_step
from voxtral_dist.checkpoints.files import flush_to_disk
from voxtral_dist.checkpoints.verifying import verified
from voxtral_dist.config import RunConfig, StorageConfig
from voxtral_dist.data.stored.storage import MissingFileError, StorageError, join
from voxtral_dist.data.stored.storage.remote import RANGE_BYTES, Remote
from voxtral_dist.distributed.collectives import computed_on_first
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import SharedWriteError, write_reason
from voxtral_dist.output.console import say
from voxtral_dist.output.masking import masked

_METRICS, _BEST, _EVALUATIONS = "metrics.jsonl", "best.json", "evaluations"
_PROBE = "writable.txt"
log = logging.getLogger(__name__)


class RemoteCheckpoints:
    """Checkpoints of one run at a URL with a protocol of fsspec. Any thread may use it, one at a time."""

    def __init__(self, url: str, storage: StorageConfig) -> None:
        """Connect to nothing yet; `storage` has the limits of requests."""
        self.url = url.rstrip("/")
        self._remote = Remote(storage)
        # Files that this process has uploaded, by location; they are what they were, as long as size and time are.
        self._uploaded: dict[str, tuple[int, int]] = {}

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending.

        Raises:
            StorageError: they cannot be listed.
        """
        names = [name for name in self._remote.folders(self.url) if name.startswith("step-") and name[5:].isdecimal()]
        return sorted(int(name[5:]) for name in names if COMPLETE in self._remote.sizes(join(self.url, name)))

    def refuse_unwritable(self) -> None:
        """Write and remove a small file.

        Raises:
            StorageError: that is impossible.
        """
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / _PROBE
            probe.write_text("voxtral-dist\n", encoding="utf-8")
            self._remote.upload(probe, join(self.url, _PROBE))
        self._remote.remove(join(self.url, _PROBE))

    def upload(self, folder: Path) -> None:
        """Upload a complete checkpoint, and read back what was written.

        Raises:
            StorageError: it cannot be written, or is not what was written.
            OSError: the local files cannot be read.
        """
        complete = read_complete(folder)
        target = join(self.url, folder.name)
        for name, stored in complete.files.items():
            self._upload_verified(folder / name, join(target, name), stored)
        self._upload_verified(folder / COMPLETE, join(target, COMPLETE), StoredFile.of(folder / COMPLETE))

    def upload_records(self, run_dir: Path) -> None:
        """Upload metrics, results and the name of the best checkpoint, so that a resumed run has them.

        Raises:
            StorageError: they cannot be written.
            OSError: the local files cannot be read.
        """
        for path in sorted((run_dir / _EVALUATIONS).glob("step-*/*.json*")):
            self._upload_changed(path, join(self.url, path.relative_to(run_dir).as_posix()))
        if (run_dir / _BEST).is_file():
            self._upload_changed(run_dir / _BEST, join(self.url, _BEST))
        if (run_dir / _METRICS).is_file():
            # The run goes on writing.
            with tempfile.TemporaryDirectory() as folder:
                self._remote.upload(Path(shutil.copy(run_dir / _METRICS, folder)), join(self.url, _METRICS))

    def keep_only(self, num_newest: int, others: Collection[int]) -> None:
        """Remove all checkpoints but the newest ones and some others.

        Raises:
            StorageError: they cannot be listed or removed.
        """
        for step in self.steps()[:-num_newest]:
            if step not in others:
                self.remove(step)

    def remove(self, step: int) -> None:
        """Remove a checkpoint; without `complete.json`, which goes first, it is none."""
        folder = join(self.url, _name(step))
        names = self._remote.sizes(folder)
        for name in sorted(names, key=lambda name: name != COMPLETE):
            self._remote.remove(join(folder, name))
            self._uploaded.pop(join(folder, name), None)

    def download(self, step: int, run_dir: Path) -> None:
        """Download a checkpoint to where it was in `run_dir`, and verify it.

        Raises:
            DamageError: it is not what was written.
            StorageError: it cannot be read.
            OSError: there is no room for it.
        """
        source, final = join(self.url, _name(step)), checkpoint_folder(run_dir, step)
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            self._remote.download(join(source, COMPLETE), temporary / COMPLETE)
            complete = read_complete(temporary)
            free = shutil.disk_usage(temporary).free
            if free < complete.num_bytes:
                reason = f"it needs {complete.num_bytes / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free"
                raise OSError(errno.ENOSPC, reason)
            for name in complete.files:
                self._remote.download(join(source, name), temporary / name)
                flush_to_disk(temporary / name)
            verified(temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def download_records(self, run_dir: Path) -> None:
        """Download what `upload_records` has uploaded.

        Raises:
            StorageError: it cannot be read.
            OSError: it cannot be written.
        """
        wanted = [_METRICS, _BEST]
        for folder in self._remote.folders(join(self.url, _EVALUATIONS)):
            wanted += [
                f"{_EVALUATIONS}/{folder}/{name}" for name in self._remote.sizes(f"{self.url}/{_EVALUATIONS}/{folder}")
            ]
        for name in wanted:
            path = run_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            try:
                self._remote.download(join(self.url, name), temporary)
            except MissingFileError:
                continue
            temporary.replace(path)

    def _upload_changed(self, path: Path, location: str) -> None:
        known = path.stat().st_size, path.stat().st_mtime_ns
        if self._uploaded.get(location) != known:
            self._remote.upload(path, location)
            self._uploaded[location] = known

    def _upload_verified(self, path: Path, location: str, stored: StoredFile) -> None:
        known = path.stat().st_size, path.stat().st_mtime_ns
        if self._uploaded.get(location) == known:
            return
        self._remote.upload(path, location)
        # A store's own checksum would be that of its parts, and not every store has one.
        digest = xxhash.xxh3_128()
        for offset in range(0, stored.num_bytes, RANGE_BYTES):
            digest.update(self._remote.read(location, offset, min(RANGE_BYTES, stored.num_bytes - offset)))
        if stored.xxh3 is not None and digest.hexdigest() != stored.xxh3:
            raise StorageError(f"{masked(location)} is not what was uploaded (another checksum)")
        self._uploaded[location] = known


def fetch_newest(config: RunConfig, world: World) -> None:
    """Download the newest whole checkpoint from `checkpoint.upload` if `run_dir` has none as new. All ranks call it.

    Raises:
        SharedWriteError: on all ranks: `run_dir` has no checkpoint, and the store does not answer or cannot be written;
            or there is no room.
        UserError: the URL cannot be used at all; on rank 0.
    """
    if config.checkpoint.upload is None:
        return
    remote = RemoteCheckpoints(config.checkpoint.upload, config.storage)
    failure = computed_on_first(lambda: _fetched(remote, config.run_dir), world)
    if failure is not None:
        raise SharedWriteError(failure)


def _fetched(remote: RemoteCheckpoints, run_dir: Path) -> str | None:
    """Why the run cannot begin; None if it can."""
    newest = newest_intact_step(run_dir)
    try:
        remote.refuse_unwritable()
        are_damaged = _download_newer(remote, run_dir, -1 if newest is None else newest)
        if are_damaged and newest is None:
            return (
                f"`checkpoint.upload`: all checkpoints at {masked(remote.url)} are damaged: remove them to start over, "
                "or set another URL."
            )
    except StorageError as error:
        if newest is not None:
            log.warning("Checkpoints are not uploaded for now, and newer ones cannot be looked for: %s.", error)
            return None
        return (
            f"`checkpoint.upload`: whether {masked(remote.url)} holds a checkpoint of this run is not known: {error}. "
            "`run_dir` has none, so the run would begin anew: try again later, or set another URL or null."
        )
    except OSError as error:
        return f"`checkpoint.upload`: a checkpoint cannot be downloaded to {run_dir}: {write_reason(error)}."
    return None


def _download_newer(remote: RemoteCheckpoints, run_dir: Path, newest: int) -> bool:
    """Download the newest whole checkpoint after a step, and the best one; whether there are damaged ones alone."""
    steps = remote.steps()
    are_damaged = False
    for step in reversed([step for step in steps if step > newest]):
        try:
            remote.download(step, run_dir)
        except DamageError as error:
            log.warning("The checkpoint of step %d at %s is not used: %s", step, masked(remote.url), error)
            are_damaged = True
            continue
        remote.download_records(run_dir)
        best = _best_step(run_dir)
        if best in steps and best != step and not checkpoint_folder(run_dir, best).exists():
            remote.download(best, run_dir)
        say(f"Downloaded the checkpoint of step {step} from {masked(remote.url)}.")
        return False
    return are_damaged


def _best_step(run_dir: Path) -> int:
    try:
        best = json.loads((run_dir / _BEST).read_bytes())
        return int(best["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def _name(step: int) -> str:
    return f"step-{step:07d}"

"""Locks on builds of DeepSpeed's extensions: refused exactly where torch would wait for a killed build."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils import cpp_extension
from torch.utils._cpp_extension_versioner import ExtensionVersioner
from torch.utils.file_baton import FileBaton

from voxtral_dist.engine.zero import build_lock, extensions
from voxtral_dist.engine.zero.build_lock import BuildLock
from voxtral_dist.engine.zero.extensions import extension_locks, old_locks, refuse_old_locks, use_build_locks
from voxtral_dist.errors import UserError

HOUR = 3600


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    return lock


def age(lock: Path) -> None:
    os.utime(lock, (time.time() - HOUR,) * 2)


def be_killed_while_building(lock: Path) -> None:
    """Hold the lock as torch does around a build, and die."""
    if hasattr(cpp_extension, "FileBaton"):
        assert FileBaton(str(lock)).try_acquire()
    else:
        cpp_extension.FileLock(str(lock)).acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def would_wait(lock: Path) -> bool:
    """Whether torch's next build would find the lock held."""
    if hasattr(cpp_extension, "FileBaton"):
        return not FileBaton(str(lock)).try_acquire()
    try:
        with cpp_extension.FileLock(str(lock), blocking=False):
            return False
    except TimeoutError:
        return True


def test_a_run_is_refused_exactly_where_torch_would_wait_for_a_killed_build(lock: Path) -> None:
    builder = multiprocessing.get_context("fork").Process(target=be_killed_while_building, args=(lock,))
    builder.start()
    builder.join()
    assert builder.exitcode == -signal.SIGKILL
    age(lock)
    if would_wait(lock):
        with pytest.raises(UserError, match=rf"The lock {lock} is 60 minutes old: a build .* was killed"):
            refuse_old_locks()
    else:
        refuse_old_locks()


@pytest.mark.parametrize(("files_are_locks", "found"), [(True, True), (False, False)])
def test_files_count_where_torch_takes_them_for_locks(
    files_are_locks: bool, found: bool, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extensions, "_FILES_ARE_LOCKS", files_are_locks)
    lock.touch()
    assert extension_locks() == ([lock] if found else [])
    assert old_locks() == []
    age(lock)
    assert [one for one, _ in old_locks()] == ([lock] if found else [])


def test_a_recent_lock_is_said_and_no_reason_to_stop(
    lock: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extensions, "_FILES_ARE_LOCKS", True)
    lock.touch()
    refuse_old_locks()
    assert f"says the lock {lock}, and this run may wait for it" in caplog.text


def load(lock: Path, build: Callable[..., None]) -> object:
    """Load an extension as torch does, with our locks and a builder and a library of our own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp_extension, "FileBaton", None, raising=False)
        use_build_locks()
        patch.setattr(cpp_extension, "_write_ninja_file_and_build_library", build)
        patch.setattr(cpp_extension, "_import_module_from_library", lambda *_: "loaded")
        # Of a process that has loaded nothing yet.
        patch.setattr(cpp_extension, "JIT_EXTENSION_VERSIONER", ExtensionVersioner())
        flags: list[list[str]] = [[] for _ in range(6)]
        return cpp_extension._jit_compile("x", *flags, str(lock.parent), False, False, False, True, False)


def be_killed(**_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(cpp_extension, "FileBaton"), reason="the kernel holds torch's own locks")
def test_a_killed_run_keeps_no_other_from_loading_extensions(lock: Path) -> None:
    killed = multiprocessing.get_context("fork").Process(target=load, args=(lock, be_killed))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    age(lock)
    assert extension_locks() == [lock]
    assert old_locks() == []
    refuse_old_locks()
    built: list[bool] = []
    assert load(lock, lambda **_: built.append(lock.exists())) == "loaded"
    assert built == [True], "it builds what the killed one may have left unfinished"
    assert not lock.exists()


@pytest.mark.parametrize("other", [BuildLock, FileBaton])
def test_a_living_process_that_builds_is_waited_for(
    lock: Path, other: Callable[[str], BuildLock], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, mine = other(str(lock)), BuildLock(str(lock))
    assert theirs.try_acquire()
    assert not mine.take_over()
    monkeypatch.setattr(build_lock.time, "sleep", lambda _: theirs.release())
    assert not mine.try_acquire(), "what it has built is loaded"
    assert mine.try_acquire()
    assert not FileBaton(str(lock)).try_acquire()
    mine.release()

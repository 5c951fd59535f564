"""Three hosts of this machine: network namespaces with names and addresses of their own, connected by a switch."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ranks import end_of_program, start_program

NUM_HOSTS = 3
ALL = range(NUM_HOSTS)
_SHARED_MEMORY = "/dev/shm"
# linux/sched.h and sys/mount.h
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWNET = 0x00020000, 0x04000000, 0x40000000
_MS_BIND, _MS_REC, _MS_SLAVE = 4096, 16384, 1 << 19


class NoNamespacesError(Exception):
    """This machine makes no network namespaces; the message says why."""


@dataclass
class Program:
    """A program on a host, with what it prints.

    Attributes:
        poll: returns its exit code, which is negative after a signal; None while it runs.
        ended_at: the time by `time.monotonic` when it was seen to have ended.
    """

    host: int
    process_id: int
    poll: Callable[[], int | None]
    log: Path
    started_at: float = field(default_factory=time.monotonic)
    ended_at: float | None = None

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        code = self.poll()
        if code is not None and self.ended_at is None:
            self.ended_at = time.monotonic()
        return code


class Network:
    """Hosts `host-0` to `host-2`, which share the file system and nothing else; `close` removes them."""

    def __init__(self) -> None:
        """Make the hosts.

        Raises:
            NoNamespacesError: this machine cannot.
        """
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise NoNamespacesError("network namespaces need root and iproute2")
        self.names = [f"host-{host}" for host in ALL]
        self.addresses = [f"10.77.1.{host + 1}" for host in ALL]
        self._namespaces = [f"voxtral-{os.getpid()}-{name}" for name in self.names]
        self._switch = f"voxtral-{os.getpid()}-switch"
        try:
            self._connect()
        except subprocess.CalledProcessError as error:
            self.close()
            raise NoNamespacesError(f"this machine makes no network namespaces: {error.stderr.strip()}") from error

    def _connect(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        known = ["127.0.0.1 localhost", *(f"{a} {n}" for a, n in zip(self.addresses, self.names, strict=True))]
        for namespace, name, address in zip(self._namespaces, self.names, self.addresses, strict=True):
            _ip("netns", "add", namespace)
            _ip(*f"-n {self._switch} link add {name} type veth peer name eth0 netns {namespace}".split())
            _ip("-n", self._switch, "link", "set", name, "master", "bridge", "up")
            _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
            # Its own name must resolve too: gloo listens on that address.
            hosts = _hosts_file(namespace)
            hosts.parent.mkdir(parents=True)
            hosts.write_text("\n".join(known) + "\n")
            _memory_folder(namespace).mkdir()

    def launch(
        self, host: int, command: Sequence[str | Path], variables: Mapping[str, str], folder: Path, log: Path
    ) -> Program:
        """Start a command on a host, with these variables alone; `folder` is its working folder."""
        memory = _memory_folder(self._namespaces[host])
        script = f'mount --bind {memory} {_SHARED_MEMORY} && hostname "$0" && exec "$@"'
        # `ip netns exec` mounts the namespace's file as /etc/hosts.
        prefix = ["ip", "netns", "exec", self._namespaces[host], "unshare", "--uts", "sh", "-c", script]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*prefix, self.names[host], *map(str, command)],
                env=dict(variables),
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Program(host, process.pid, process.poll, log)

    def fork(self, host: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> Program:
        """Start a function as a program on a host, which prints to a file in `folder`; see `ranks.start_program`."""
        folder.mkdir()
        place = (self._namespaces[host], self.names[host])
        process_id = start_program(folder, _on_host, *place, function, arguments)
        return Program(host, process_id, lambda: end_of_program(process_id), folder / "output-0")

    def cut(self, host: int) -> None:
        """Cut the host's cable. Connections stay open: nothing tells either end."""
        _ip("-n", self._switch, "link", "set", self.names[host], "down")

    def mend(self, host: int) -> None:
        """Join the host's cable again."""
        _ip("-n", self._switch, "link", "set", self.names[host], "up")

    def signal(self, host: int, number: signal.Signals) -> None:
        """Send a signal to every process of a host at once."""
        for process in _ip("netns", "pids", self._namespaces[host]).split():
            try:
                os.kill(int(process), number)
            except ProcessLookupError:
                continue

    def num_processes(self, host: int) -> int:
        """Number of processes that run on a host."""
        return len(_ip("netns", "pids", self._namespaces[host]).split())

    def clear(self) -> None:
        """Kill all that runs on the hosts, and join all cables."""
        for host in ALL:
            self.signal(host, signal.SIGKILL)
            self.mend(host)
        while any(map(self.num_processes, ALL)):
            time.sleep(0.05)

    def close(self) -> None:
        """Remove the hosts."""
        for namespace in [*self._namespaces, self._switch]:
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)
            shutil.rmtree(_hosts_file(namespace).parent, ignore_errors=True)
            shutil.rmtree(_memory_folder(namespace), ignore_errors=True)


def wait_for_end(programs: Sequence[Program], seconds: float) -> None:
    """Wait until all have ended, and note when each did; those that have not within the limit are left running."""
    deadline = time.monotonic() + seconds
    # Each is asked at every turn.
    while None in [program.code for program in programs] and time.monotonic() < deadline:
        time.sleep(0.05)


def _on_host(
    _rank: int, namespace: str, name: str, function: Callable[..., Any], arguments: tuple[object, ...]
) -> None:
    """Make this process one of a host, as `Network.launch` does, and call the function."""
    with Path("/run/netns", namespace).open() as file:
        _call("setns", file.fileno(), _CLONE_NEWNET)
    _call("unshare", _CLONE_NEWNS | _CLONE_NEWUTS)
    socket.sethostname(name)
    # What is mounted from here on is seen by this process alone.
    _call("mount", None, b"/", None, _MS_REC | _MS_SLAVE, None)
    _call("mount", bytes(_hosts_file(namespace)), b"/etc/hosts", None, _MS_BIND, None)
    _call("mount", bytes(_memory_folder(namespace)), _SHARED_MEMORY.encode(), None, _MS_BIND, None)
    function(*arguments)


def _call(name: str, *arguments: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _hosts_file(namespace: str) -> Path:
    return Path("/etc/netns", namespace, "hosts")


def _memory_folder(namespace: str) -> Path:
    """What the processes of a host see as `_SHARED_MEMORY`."""
    return Path(_SHARED_MEMORY, namespace)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout

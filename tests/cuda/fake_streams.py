"""DeepSpeed's code for devices with streams, on the CPU: its accelerator says that it is asynchronous, and streams and
events do nothing but count.

DeepSpeed chooses between its code for GPUs and that for CPUs by what the accelerator says. On the CPU all work is done
when a call returns, so that numbers must not change. Races cannot be seen: nothing here is late.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import torch


class StreamLog:
    """Number of calls since the last `take`, by name.

    latest: the last call of all but `record_stream`, which only keeps memory from being used again.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.latest = ""

    def add(self, name: str) -> None:
        """Count a call."""
        self.calls[name] += 1
        if name != "record_stream":
            self.latest = name

    def take(self) -> Counter[str]:
        """The calls so far; a new count begins."""
        taken, self.calls = self.calls, Counter()
        return taken


def num_waits(calls: Counter[str]) -> int:
    """How often the host waited for the device, one of its streams or an event."""
    return sum(count for name, count in calls.items() if is_wait(name))


def is_wait(name: str) -> bool:
    """Whether the host waits in a call; in others a stream waits, or nothing does."""
    return name.startswith("synchronize")


def install_streams() -> StreamLog:
    """Make DeepSpeed's accelerator of this process one with streams, for good."""
    from deepspeed.accelerator import get_accelerator

    log = StreamLog()

    def counted(name: str, result: Any = None) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            log.add(name)
            return result

        return call

    class Event:
        record = counted("record_event")
        synchronize = counted("synchronize_event")
        wait = counted("wait_for_event")
        query = counted("query_event", True)

        def __init__(self, *_: Any, **__: Any) -> None:
            """Take what a CUDA event takes."""

    class Stream:
        wait_stream = counted("wait_for_stream")
        wait_event = counted("wait_for_event")
        synchronize = counted("synchronize_stream")
        query = counted("query_stream", True)

        def __init__(self, *_: Any, **__: Any) -> None:
            """Take what a CUDA stream takes."""

        def record_event(self, event: Event | None = None) -> Event:
            """An event of this stream."""
            return event or Event()

    accelerator: Any = type(get_accelerator())
    for name in ("is_synchronized_device", "resolves_data_dependency", "handles_memory_backpressure"):
        setattr(accelerator, name, lambda self: False)
    current = Stream()
    accelerator.use_host_timers = lambda self: False
    accelerator.Stream = property(lambda self: Stream)
    accelerator.Event = property(lambda self: Event)
    accelerator.stream = lambda self, stream: contextlib.nullcontext()
    accelerator.current_stream = lambda self, device_index=None: current
    accelerator.default_stream = lambda self, device_index=None: current
    accelerator.synchronize = counted("synchronize_device")
    torch.Tensor.record_stream = counted("record_stream")  # type: ignore[method-assign]
    return log

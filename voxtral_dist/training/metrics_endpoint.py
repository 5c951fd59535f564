"""Metrics of a run for Prometheus, and an answer for probes, served by the first rank of each host."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from voxtral_dist.distributed.failures import heard_seconds_ago
from voxtral_dist.distributed.world import World
from voxtral_dist.errors import RankError, UserError, write_reason

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_ALIVE = "/alive"
# Keys of rows of `metrics.jsonl`, by the metric's name and help. All are gauges of the newest step.
STEP_GAUGES = {
    "voxtral_loss_nats": ("loss", "Mean training loss per target token of the newest step."),
    "voxtral_learning_rate": ("learning_rate", "Learning rate of the newest step."),
    "voxtral_gradient_norm": ("grad_norm", "Norm of the gradient of the newest step."),
    "voxtral_step_seconds": ("step_seconds", "Duration of the newest step."),
    "voxtral_waiting_seconds": ("waiting_seconds", "Part of the newest step spent waiting for data, at most."),
    "voxtral_audio_seconds_per_second": ("audio_seconds_per_second", "Audio trained on per second, over all ranks."),
    "voxtral_tokens_per_second": ("tokens_per_second", "Positions of the language model per second, over all ranks."),
    "voxtral_model_flops_utilization": ("model_flops_utilization", "Model FLOPs utilization, from 0 to 1."),
    "voxtral_peak_memory_bytes": ("memory_gigabytes", "Peak memory of a rank, the maximum over ranks."),
}
_SCALES = {"memory_gigabytes": 1e9}


class MetricsEndpoint:
    """The newest measurements of a run.

    `/metrics` has them in Prometheus' format. `/alive` answers 200 while the process hears from the ranks' store, and
    503 once it has not for `limit_seconds`.
    """

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._values: dict[str, float] = {}

    def begin(self, num_steps: int, first_step: int, checkpoint_time: float | None) -> None:
        """Note that the run continues after `first_step` updates of `num_steps`, from a checkpoint of that time."""
        self._set({"voxtral_step": first_step, "voxtral_num_steps": num_steps})
        if checkpoint_time is not None:
            self.record_checkpoint(first_step, checkpoint_time)

    def record_step(self, step: int, row: dict[str, Any]) -> None:
        """Take the row of a step, as in `metrics.jsonl`."""
        found = {name: row[key] * _SCALES.get(key, 1) for name, (key, _) in STEP_GAUGES.items() if row[key] is not None}
        self._set(found | {"voxtral_step": step, "voxtral_newest_step_timestamp_seconds": time.time()})

    def record_checkpoint(self, step: int, at: float) -> None:
        """Note that a checkpoint is complete, and since when."""
        self._set({"voxtral_checkpoint_step": step, "voxtral_newest_checkpoint_timestamp_seconds": at})

    def _set(self, values: dict[str, float]) -> None:
        with self._lock:
            self._values |= values

    def collect(self) -> Iterator[Metric]:
        """The metrics, which prometheus_client asks for when it is scraped."""
        from prometheus_client.core import GaugeMetricFamily

        with self._lock:
            values = dict(self._values)
        values["voxtral_heartbeat_timestamp_seconds"] = time.time() - heard_seconds_ago()
        for name, text in GAUGES.items():
            if name in values:
                yield GaugeMetricFamily(name, text, value=values[name])

    def is_alive(self) -> bool:
        """Whether the process has heard from the ranks' store within the limit."""
        return heard_seconds_ago() <= self._limit_seconds


GAUGES = {
    "voxtral_step": "Updates so far.",
    "voxtral_num_steps": "Updates of the whole run.",
    "voxtral_newest_step_timestamp_seconds": "Time at which the newest step ended.",
    "voxtral_checkpoint_step": "Step of the newest checkpoint that this process has seen completed.",
    "voxtral_newest_checkpoint_timestamp_seconds": "Time at which that checkpoint was complete.",
    "voxtral_heartbeat_timestamp_seconds": "Time at which this process last heard from the ranks' store.",
    **{name: text for name, (_, text) in STEP_GAUGES.items()},
}


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # A dual-stack socket takes IPv4 too; pods may have IPv6 addresses only.
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, *_arguments: object, **_named: object) -> None:
        """Say nothing: probes come every few seconds."""


def refuse_without_client(port: int | None) -> None:
    """Refuse a port without the package that answers on it; all ranks meet the same.

    Raises:
        UserError: the package prometheus_client is missing.
    """
    if port is not None and find_spec("prometheus_client") is None:
        raise UserError(
            "`metrics.prometheus_port` needs the package prometheus_client: install it by `pip install "
            "'voxtral-dist[prometheus]'`, or leave the setting out."
        )


@contextmanager
def served_metrics(port: int | None, limit_seconds: float, world: World) -> Iterator[MetricsEndpoint | None]:
    """Serve an endpoint on the first rank of each host until the context ends; None elsewhere, or without a port.

    Args:
        port: of all addresses of the host.
        limit_seconds: how long a process may not hear from the ranks' store before it counts as dead.
        world: all ranks.

    Raises:
        UserError: the package prometheus_client is missing.
        RankError: the port is in use.
    """
    refuse_without_client(port)
    if port is None or world.local_rank != 0:
        yield None
        return
    endpoint = MetricsEndpoint(limit_seconds)
    try:
        server = make_server("", port, _application(endpoint), server_class=_Server, handler_class=_SilentHandler)
    except OSError as error:
        raise RankError(
            f"`metrics.prometheus_port`: rank {world.rank} on {socket.gethostname()} cannot serve on port {port}: "
            f"{write_reason(error)}. Choose a free port, or leave the setting out."
        ) from error
    # Data workers that outlive a killed rank would keep the port.
    os.register_at_fork(after_in_child=server.server_close)
    threading.Thread(target=server.serve_forever, name="metrics-endpoint", daemon=True).start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()


def _application(endpoint: MetricsEndpoint) -> Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]:
    from prometheus_client import CollectorRegistry, make_wsgi_app

    registry = CollectorRegistry()
    registry.register(endpoint)
    metrics = make_wsgi_app(registry)

    def answer(environment: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environment["PATH_INFO"] != _ALIVE:
            found: Iterable[bytes] = metrics(environment, start_response)
            return found
        is_alive = endpoint.is_alive()
        start_response("200 OK" if is_alive else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"alive\n" if is_alive else b"no sign of life of other ranks\n"]

    return answer

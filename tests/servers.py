"""Real servers on localhost: an S3 object store, and a web server with injected faults."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import boto3
from moto.server import ThreadedMotoServer

Fault = Literal["503", "403", "404", "429", "cut", "short", "stall", "whole", "close"]
STALL_SECONDS = 30.0


class FileServer:
    """A server of `files` by name, with ranges and ETags. Each GET request takes the next fault from `faults`."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.lasting_fault: Fault | None = None
        self.requests: list[tuple[str, str, str | None]] = []
        self.seconds_per_request = 0.0
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def ranges(self) -> Counter[tuple[str, str | None]]:
        """The number of requests for each range."""
        return Counter((path, part) for method, path, part in self.requests if method == "GET")

    def log(self, method: str, path: str, part: str | None) -> Fault | None:
        with self._lock:
            self.requests.append((method, path, part))
            if method != "GET":
                return None
            return self.faults.pop(0) if self.faults else self.lasting_fault

    def stop(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # With the default of 5, simultaneous connections wait for a second.


class _Handler(BaseHTTPRequestHandler):
    owner: FileServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        part = self.headers.get("Range")
        path = self.path.partition("?")[0]
        fault = self.owner.log(self.command, path, part)
        contents = self.owner.files.get(path.lstrip("/"))
        if contents is None or (fault is not None and fault.isdigit()):
            self._send(int(fault or 404), b"", 0)
            return
        if fault == "stall":
            self.owner.stopping.wait(STALL_SECONDS)
        elif fault == "close":
            self.close_connection = True
        else:
            time.sleep(self.owner.seconds_per_request)
            self._send_contents(contents, None if fault == "whole" else part, with_body, fault)

    def _send_contents(self, contents: bytes, part: str | None, with_body: bool, fault: Fault | None) -> None:
        status, etag = 200, f'"{hash(contents):x}"'
        if part is not None:
            start, _, last = part.removeprefix("bytes=").partition("-")
            if int(start) >= len(contents):
                self._send(416, b"", 0)
                return
            contents, status = contents[int(start) : int(last) + 1], 206
        if fault == "short":
            contents = contents[: len(contents) // 2]
        body = contents[: len(contents) // 2] if fault == "cut" else contents
        self._send(status, body if with_body else b"", len(contents), etag)
        if fault == "cut":
            self.close_connection = True

    def _send(self, status: int, body: bytes, content_length: int, etag: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(content_length))
        if etag is not None:
            self.send_header("ETag", etag)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def file_server() -> Iterator[FileServer]:
    """A web server that runs until the block ends."""
    server = FileServer()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """An S3 server with a bucket `corpus`; yields the environment variables by which AWS clients find it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket="corpus")
    try:
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()


class Gate:
    """A port that leads to another one of this machine, and lets nothing through while it is closed.

    num_held: how many pieces of requests and answers had to wait.
    """

    def __init__(self, port: int) -> None:
        self.num_held = 0
        self._leads_to = port
        self._open = threading.Event()
        self._open.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def remove(self) -> None:
        self.open()
        # Wakes the thread that accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._leads_to))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                self.num_held += not self._open.is_set()
                self._open.wait()
                target.sendall(piece)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@contextmanager
def gate_before(url: str) -> Iterator[Gate]:
    """An open gate before a server of this machine, until the block ends."""
    gate = Gate(int(url.rsplit(":", 1)[1]))
    try:
        yield gate
    finally:
        gate.remove()

"""A server on localhost that answers like the Hugging Face hub to what uploads a model, with injected refusals.

To what streams a dataset it answers, too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

TOKEN, READ_TOKEN = "hf_write_0123456789", "hf_read_0123456789"
USER = "someone"
COMMIT = "0" * 40
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "other")


@dataclass
class Repository:
    """A repository: contents by path, and the number of commits."""

    is_private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b""})
    num_commits: int = 0


class HubServer:
    """Repositories by name and large files by SHA-256.

    datasets: files of public datasets by name and path. max_put_bytes: larger uploads are refused with status 507 until
    it is None. puts: SHA-256 of all uploads. tokens: access tokens that were sent.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.datasets: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.max_put_bytes: int | None = None
        self.puts: list[str] = []
        self.tokens: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A hub that runs until the block ends."""
    server = HubServer()
    try:
        yield server
    finally:
        server.stop()


class _RefusalError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", body: Any = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        self._answer(self._body())

    def _answer(self, body: bytes) -> None:
        try:
            status, answer, headers = 200, self._respond(self.path.partition("?")[0], body), {}
        except _RefusalError as refusal:
            status, answer = refusal.status, refusal.body or {"error": refusal.message}
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
        if isinstance(answer, bytes):
            status, answer, headers = self._span(answer)
        contents = answer if isinstance(answer, bytes) else _encoded(answer)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(contents)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(contents)

    def _span(self, contents: bytes) -> tuple[int, bytes, dict[str, str]]:
        """A file of a repository, or the part of it that is asked for."""
        headers = {"ETag": f'"{_blob_id(contents)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            return 200, contents, headers
        start, end = int(wanted[1]), min(int(wanted[2]), len(contents) - 1)
        return 206, contents[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(contents)}"}

    def _respond(self, path: str, body: bytes) -> Any:
        """Find the route of a request."""
        if path == "/api/validate-yaml":
            return self._validated(json.loads(body)["content"])
        if (match := re.fullmatch(r"/lfs/(\w+)", path)) and self.command == "PUT":
            return self._put(match[1], body)
        if path.startswith(("/datasets/", "/api/datasets/")):
            return self._of_dataset(unquote(path))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.tokens |= {token} - {""}
        if token not in (TOKEN, READ_TOKEN):
            raise _RefusalError(401, message="Invalid credentials in Authorization header")
        if self.command == "POST" and token == READ_TOKEN:
            raise _RefusalError(403, message="you need a token with write access")
        if path == "/api/repos/create":
            return self._created(json.loads(body))
        match = re.fullmatch(
            r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?(?:/(tree|preupload|commit|info|revision)/.*)?", path
        )
        if match is None or match[1] not in self.hub.repositories:
            raise _RefusalError(404, "RepoNotFound", "Repository not found")
        return self._of_repository(match[1], match[2], body)

    def _of_repository(self, name: str, action: str | None, body: bytes) -> Any:
        repository = self.hub.repositories[name]
        match action:
            case None | "revision":
                return {"id": name, "private": repository.is_private, "sha": COMMIT}
            case "tree":
                sizes = {path: len(contents) for path, contents in repository.files.items()}
                return [{"type": "file", "path": path, "size": size, "oid": COMMIT} for path, size in sizes.items()]
            case "preupload":
                return {"files": [self._mode(repository, one["path"]) for one in json.loads(body)["files"]]}
            case "info":
                return {"transfer": "basic", "objects": [self._upload_of(one) for one in json.loads(body)["objects"]]}
            case _:
                return self._committed(name, repository, [json.loads(line) for line in body.splitlines()])

    def _of_dataset(self, path: str) -> Any:
        match = re.fullmatch(r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path)
        if match is None or match[1] not in self.hub.datasets:
            raise _RefusalError(404, "RepoNotFound", "Repository not found")
        name, action, _, inside = match.groups()
        files = self.hub.datasets[name]
        if action == "tree":
            return _children(files, f"{inside}/" if inside else "")
        if action != "resolve":
            return {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
        if inside not in files:
            raise _RefusalError(404, "EntryNotFound", "Entry not found")
        return files[inside]

    def _created(self, wanted: dict[str, Any]) -> Any:
        if wanted["organization"] != USER:
            raise _RefusalError(404, message="There is no such namespace")
        name = f"{wanted['organization']}/{wanted['name']}"
        self.hub.repositories[name] = Repository(wanted.get("visibility") == "private" or wanted.get("private") is True)
        return {"url": f"{self.hub.url}/{name}"}

    def _validated(self, card: str) -> Any:
        """Check what the hub checks: YAML, a known licence, and the parts of results that must be there."""
        data = yaml.safe_load(card.split("---\n")[1])
        errors = [] if data.get("license") in (None, *LICENSES) else ['"license" must be one of the known licences']
        for result in (result for model in data.get("model-index", []) for result in model["results"]):
            if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
                errors.append('"model-index" is incomplete')
            errors += ['"value" must be a number' for one in result["metrics"] if not isinstance(one["value"], float)]
        if errors:
            as_text = "text/plain" in self.headers.get("Accept", "")
            raise _RefusalError(
                400, body="\n".join(errors) if as_text else {"errors": [{"message": one} for one in errors]}
            )
        return {"errors": [], "warnings": []}

    def _mode(self, repository: Repository, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith((".safetensors", "tekken.json")) else "regular"
        stored = repository.files.get(path)
        oid = None
        if stored is not None:
            is_large = mode == "lfs"
            oid = hashlib.sha256(stored).hexdigest() if is_large else _blob_id(stored)
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _upload_of(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """The actions for a large file: none if it is here."""
        action = (
            {} if wanted["oid"] in self.hub.objects else {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
        )
        return {"oid": wanted["oid"], "size": wanted["size"]} | ({"actions": action} if action else {})

    def _put(self, oid: str, contents: bytes) -> Any:
        self.hub.puts.append(oid)
        if self.hub.max_put_bytes is not None and len(contents) > self.hub.max_put_bytes:
            raise _RefusalError(507)
        assert hashlib.sha256(contents).hexdigest() == oid
        self.hub.objects[oid] = contents
        return {}

    def _committed(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> Any:
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del repository.files[value["path"]]
        repository.num_commits += 1
        return {"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": "1" * 40}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        contents = b""
        while size := int(self.rfile.readline(), 16):
            contents += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return contents

    def log_message(self, *_: object) -> None:
        pass


def _encoded(answer: Any) -> bytes:
    return (answer if isinstance(answer, str) else json.dumps(answer)).encode()


def _children(files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
    """The files and folders right inside of a folder, as the hub lists them."""
    found: dict[str, dict[str, Any]] = {}
    for path, contents in files.items():
        name, _, rest = path.removeprefix(folder).partition("/")
        if path.startswith(folder):
            kind = {"type": "directory", "oid": COMMIT}
            one = kind if rest else {"type": "file", "size": len(contents), "oid": _blob_id(contents)}
            found[name] = one | {"path": folder + name}
    return list(found.values())


def _blob_id(contents: bytes) -> str:
    """Git's identifier of a file."""
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()

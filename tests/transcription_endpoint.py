"""A real HTTP server on localhost with OpenAI's route for transcriptions, as vLLM has it, and injected faults."""

from __future__ import annotations

import io
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import soundfile
import torch
from transformers import VoxtralForConditionalGeneration, VoxtralProcessor
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

Fault = Literal["400", "401", "429", "500", "503", "cut", "page", "moved", "garbled"]
logging.getLogger("werkzeug").setLevel(logging.ERROR)
# From the fields of a request and the bytes of its file to a transcript.
Transcribe = Callable[[dict[str, str], bytes], str]


class TranscriptionEndpoint:
    """Transcripts of one served model. Each request for one takes the next fault from `faults`, if there is any."""

    def __init__(self, transcribe: Transcribe, names: Iterable[str] = ("served",)) -> None:
        self.transcribe = transcribe
        self.names = list(names)
        self.faults: list[Fault] = []
        self.lasting_fault: Fault | None = None
        self.retry_after = "0"
        self.requests: list[dict[str, str]] = []
        self.authorizations: list[str | None] = []
        self.may_list = threading.Event()
        self.may_list.set()
        self._lock = threading.Lock()
        self._server = make_server("127.0.0.1", 0, Request.application(self._answer), threaded=True)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: Request) -> Response:
        self.authorizations.append(request.headers.get("Authorization"))
        if (request.method, request.path) == ("GET", "/v1/models"):
            self.may_list.wait()
            return _json({"object": "list", "data": [{"id": name, "object": "model"} for name in self.names]})
        if (request.method, request.path) != ("POST", "/v1/audio/transcriptions"):
            return _json({"detail": "Not Found"}, 404)
        fields, contents = request.form.to_dict(), request.files["file"].read()
        with self._lock:
            self.requests.append(fields)
            fault = self.faults.pop(0) if self.faults else self.lasting_fault
        return self._fail(fault, request) if fault else _json({"text": self.transcribe(fields, contents)})

    def _fail(self, fault: Fault, request: Request) -> Response:
        if fault == "page":
            return Response("<html>a login page</html>", mimetype="text/html")
        if fault == "moved":
            return Response(status=308, headers={"Location": f"https://new.example{request.path}"})
        if fault == "garbled":
            return Response(b"not compressed", headers={"Content-Encoding": "gzip"})
        if fault == "cut":
            connection: socket.socket = request.environ["werkzeug.socket"]
            connection.shutdown(socket.SHUT_RDWR)
            return Response()
        error = {"error": {"message": f"injected {fault}", "type": "Error", "code": int(fault)}}
        return _json(error, int(fault), {"Retry-After": self.retry_after} if fault in ("429", "503") else {})


def _json(contents: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(contents), status, headers, mimetype="application/json")


@contextmanager
def transcription_endpoint(
    transcribe: Transcribe, names: Iterable[str] = ("served",)
) -> Iterator[TranscriptionEndpoint]:
    """A server that runs until the block ends."""
    endpoint = TranscriptionEndpoint(transcribe, names)
    try:
        yield endpoint
    finally:
        endpoint.stop()


class ByTransformers:
    """A tiny model served by transformers alone, with prompts of mistral-common and features of transformers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processor: Any = VoxtralProcessor.from_pretrained(folder)
        self._model: Any = VoxtralForConditionalGeneration.from_pretrained(folder).eval()
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, fields: dict[str, str], contents: bytes) -> str:
        assert float(fields["temperature"]) == 0, "greedy"
        waveform, sampling_rate = soundfile.read(io.BytesIO(contents), dtype="float32")
        positions = self._model.config.audio_config.max_source_positions
        with self._lock:
            inputs = self._processor.apply_transcription_request(
                audio=[waveform],
                language=[fields.get("language")],
                model_id=str(self._folder),
                sampling_rate=sampling_rate,
                format=["WAV"],
                audio_kwargs={"pad_to_multiple_of": 320 * positions, "max_source_positions": 2 * positions},
            )
            generated = self._model.generate(
                **inputs, max_new_tokens=int(fields["max_completion_tokens"]), do_sample=False
            )
        completion = generated[0, inputs["input_ids"].shape[1] :]
        return str(self._processor.tokenizer.decode(completion, skip_special_tokens=True))

"""The client of a server with OpenAI's route for transcriptions, such as vLLM."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2

from voxtral_dist.errors import UserError, first_line
from voxtral_dist.files import encodable
from voxtral_dist.serving.retries import PASSING_STATUSES, Outage, pause_seconds

_TRANSCRIPTIONS, _MODELS = "/v1/audio/transcriptions", "/v1/models"
# A recording of many minutes may wait in the server's queue, and then takes its time.
_ANSWER_SECONDS, _CONNECT_SECONDS = 600.0, 10.0
# Its list of models does not wait for the model.
_LIST_SECONDS = 30.0
_SHOWN_CHARACTERS = 300


class TranscriptionError(Exception):
    """A request got no transcript. The message is a predicate: callers put the server before it.

    is_outage: whether the server answered no request for too long, so that the same request may succeed later.
    """

    def __init__(self, message: str, is_outage: bool = False) -> None:
        super().__init__(message)
        self.is_outage = is_outage


class TranscriptionServer:
    """A server of one model. Requests are sent again while it is busy or away."""

    def __init__(
        self, url: str, model: str, max_connections: int, retry_seconds: float, api_key: str | None = None
    ) -> None:
        """Make a client; nothing is sent yet.

        Args:
            url: of the server, with or without `/v1` or the whole route.
            model: the name under which the model is served.
            max_connections: maximum requests in flight.
            retry_seconds: how long the server may answer no request before it is given up.
            api_key: is sent as a bearer token.

        Raises:
            UserError: the URL is none of http or https, or the key cannot be sent.
        """
        self.url = _base_url(url)
        self.model = model
        self._outage = Outage(retry_seconds)
        headers = {} if api_key is None else {"Authorization": f"Bearer {_sendable(api_key)}"}
        limits = httpx2.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
        timeout = httpx2.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS, pool=None)
        self._client = httpx2.AsyncClient(base_url=self.url, headers=headers, limits=limits, timeout=timeout)

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def refuse_unknown_model(self) -> None:
        """Refuse a name that the server does not serve, where it lists its models.

        A server that knows a base model and adapters of it would otherwise be measured with the wrong one.

        Raises:
            UserError: the server cannot be reached, or has no such model.
        """
        try:
            response = await self._client.get(_MODELS, timeout=_LIST_SECONDS)
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise UserError(
                f"`--server`: {self.url} cannot be reached ({_reason(error)}): start the server, or correct the URL."
            ) from error
        names = _model_names(response)
        if names and self.model not in names:
            raise UserError(
                f"MODEL: {self.url} serves no `{self.model}`, but {', '.join(f'`{name}`' for name in names)}: name the "
                "model as the server does."
            )

    async def transcribe(self, wav: bytes, language: str | None, max_tokens: int | None) -> str:
        """The transcript of a recording, decoded greedily.

        Args:
            wav: the recording, as a WAV file.
            language: ISO 639-1 code; None lets the model detect it.
            max_tokens: token limit of the transcript, a field of vLLM's; None sends none.

        Raises:
            TranscriptionError: the server refused the request, or answered no request for too long.
        """
        fields = {"model": self.model, "temperature": "0", "response_format": "json"}
        fields |= {} if language is None else {"language": language}
        fields |= {} if max_tokens is None else {"max_completion_tokens": str(max_tokens)}
        num_failures, failing_since = 0, 0.0
        while True:
            retry_after = None
            try:
                response = await self._client.post(
                    _TRANSCRIPTIONS, data=fields, files={"file": ("audio.wav", wav, "audio/wav")}
                )
            except httpx2.RequestError as error:
                failure = f"cannot be reached ({_reason(error)})"
            else:
                if response.is_success:
                    self._outage.end()
                    return _text(response)
                failure = f"answered HTTP {response.status_code}: {_message(response)}{_remedy(response)}"
                if response.status_code not in PASSING_STATUSES:
                    raise TranscriptionError(failure)
                retry_after = response.headers.get("Retry-After")
            num_failures += 1
            failing_since = failing_since or time.monotonic()
            seconds_left = self._outage.seconds_left(failing_since)
            if seconds_left <= 0:
                raise TranscriptionError(f"{failure}, and answered nothing else for too long", is_outage=True)
            await asyncio.sleep(min(pause_seconds(num_failures, retry_after), seconds_left))


def _base_url(url: str) -> str:
    base = url.strip().rstrip("/").removesuffix(_TRANSCRIPTIONS).removesuffix("/v1")
    if not _is_server(base):
        raise UserError(f"`--server` must be a URL such as http://localhost:8000, but is {url!r} instead.")
    return base


def _is_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # It raises an error where the port is no number or too large.
        is_complete = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and is_complete and not (parts.query or parts.fragment)


def _sendable(api_key: str) -> str:
    """A key as a header can carry it: keys that were read from a file end with a line break."""
    key = api_key.strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError("The API key (VLLM_API_KEY) has characters that a request cannot carry: copy it again.")
    return key


def _model_names(response: httpx2.Response) -> list[str]:
    """The models that a server lists; empty where it lists none."""
    if not response.is_success:
        return []
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def _text(response: httpx2.Response) -> str:
    try:
        text = response.json()["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise TranscriptionError(f"answered {_short(response.text)!r}, and not a transcript as OpenAI's servers do")
    # Half of a surrogate pair, where a token limit cut a character in two.
    return encodable(text)


def _message(response: httpx2.Response) -> str:
    """What a server says of a failed request: vLLM and OpenAI under `error`, FastAPI under `detail`."""
    try:
        body: Any = response.json()
    except ValueError:
        return _short(response.text) or response.reason_phrase
    if isinstance(body, Mapping):
        error = body.get("error") or body.get("detail") or body
        body = error.get("message", error) if isinstance(error, Mapping) else error
    return _short(str(body))


def _remedy(response: httpx2.Response) -> str:
    """What to do about a refused request, if its status says so."""
    if response.has_redirect_location:
        return f" to {response.headers['Location']} (name the server that answers itself)"
    if response.status_code == HTTPStatus.UNAUTHORIZED:
        return " (it wants the API key in the environment variable VLLM_API_KEY)"
    return ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."


def _reason(error: Exception) -> str:
    return first_line(error) or type(error).__name__

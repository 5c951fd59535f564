"""Evaluation of a served model on shard sets: the same audio, languages and results as for a model in this process.

Nothing here needs the model or torch.
"""

from __future__ import annotations

import asyncio
import io
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import soundfile

from voxtral_dist.config import MIN_NEW_TOKENS, EvaluationConfig, TextStep
from voxtral_dist.data.examples.bad_utterance import UtteranceError
from voxtral_dist.data.examples.reading import read_utterance
from voxtral_dist.data.stored.audio import AudioError, Pcm, decode_pcm
from voxtral_dist.data.stored.checks import is_same_duration
from voxtral_dist.data.stored.index import ShardIndex, read_index, sets_by_name
from voxtral_dist.data.stored.storage import Storage
from voxtral_dist.data.stored.utterance import StoredUtterance
from voxtral_dist.errors import RankError, UserError
from voxtral_dist.files import refuse_unwritable, write_errors_named
from voxtral_dist.output.counting import counted
from voxtral_dist.output.masking import masked
from voxtral_dist.progress import progress_of_command
from voxtral_dist.scoring.grouping import Grouping
from voxtral_dist.scoring.normalizer import Normalizer, normalizer
from voxtral_dist.scoring.result_files import refuse_to_replace_others, result_files, write_results
from voxtral_dist.scoring.results import Measurements, TestSetResult, score_test_set
from voxtral_dist.scoring.utterances import DecodedUtterance, score_utterance
from voxtral_dist.serving.kept_transcripts import KeptTranscripts
from voxtral_dist.serving.transcription_server import TranscriptionError, TranscriptionServer
from voxtral_dist.text.languages import split_language_tag

# What every Voxtral takes. Servers would resample other audio by filters of their own.
_SAMPLING_RATE = 16_000


@dataclass(frozen=True)
class ServedModel:
    """A model on a server, and how it is asked.

    Attributes:
        url: of the server.
        name: under which the model is served.
        concurrency: maximum requests in flight.
        retry_seconds: how long the server may answer nothing.
        sends_token_limit: whether requests name a token limit, which is a field of vLLM's.
        api_key: sent as a bearer token.
    """

    url: str
    name: str
    concurrency: int = 32
    retry_seconds: float = 300.0
    sends_token_limit: bool = True
    api_key: str | None = None


@dataclass(frozen=True)
class ServedOptions:
    """Options of requests and scoring; see `EvaluationConfig`, `TestSetConfig` and `TrainDataConfig.target_text`."""

    settings: EvaluationConfig = field(default_factory=EvaluationConfig)
    detect_language: bool = False
    target_text: tuple[TextStep, ...] = ()


def evaluate_server(
    model: ServedModel, shards: Sequence[str], options: ServedOptions, out_dir: Path
) -> Iterator[tuple[str, TestSetResult]]:
    """Transcribe and score shard folders in turn by a served model, and write their results to `out_dir`.

    Transcripts are kept in `NAME.partial.jsonl` until a set is complete, so that the same call resumes.

    Yields:
        The name and result of each folder.

    Raises:
        UserError: the server cannot be reached, has no such model or refuses a request; an utterance is unusable; or a
            set has instructions.
        OutageError: the server answered no request for `retry_seconds`.
        WriteError: results cannot be written.
    """
    storage = Storage()
    sets = [
        _ServedSet(name, read_index([folder], storage), storage, Grouping.of(options.settings))
        for name, folder in sets_by_name(shards).items()
    ]
    for one in sets:
        one.refuse_answers()
        refuse_to_replace_others("--out", out_dir, one.name)
    refuse_unwritable("--out", out_dir, [file for one in sets for file in (*result_files(one.name), one.partial_file)])
    # Before anything is sent, because an unusable normalizer is an error.
    used = normalizer(options.settings.normalizer, options.target_text)
    asyncio.run(_refuse_unknown_model(model))
    for one in sets:
        yield one.name, _evaluate(one, model, options, used, out_dir)


@dataclass(frozen=True)
class _ServedSet:
    """The utterances of one shard folder."""

    name: str
    index: ShardIndex
    storage: Storage
    grouping: Grouping

    @property
    def partial_file(self) -> str:
        return f"{self.name}.partial.jsonl"

    def refuse_answers(self) -> None:
        if any(part.layout.instruction is not None for part in self.index.sets):
            raise UserError(
                f"`{self.name}`: its texts are answers to instructions, and `--server` only asks for transcripts: "
                "evaluate the model itself."
            )

    def load(self, utterance_id: int) -> tuple[StoredUtterance, Pcm]:
        """An utterance, and its audio as int16 at 16 kHz.

        Raises:
            UserError: it is unusable. Skipping it would change the test set.
        """
        try:
            stored = read_utterance(self.index, utterance_id, self.storage)
            pcm = decode_pcm(stored.audio, _SAMPLING_RATE)
        except UtteranceError as error:
            raise self._unusable(str(error)) from error
        except AudioError as error:
            raise self._unusable(f"{stored.key} {error}") from error
        seconds, expected = len(pcm) / _SAMPLING_RATE, float(self.index.record(utterance_id)["duration_ms"]) / 1000
        if not is_same_duration(seconds, expected):
            raise self._unusable(f"{stored.key} decodes to {seconds:.2f} s, but its index says {expected:.2f} s")
        return stored, pcm

    def _unusable(self, reason: str) -> UserError:
        return UserError(
            f"The test set `{self.name}` has an unusable utterance: {reason}. Fix or remove it, then pack the set "
            "again."
        )


class _Transcription:
    """The requests of one test set: many in flight, the longest utterances first."""

    def __init__(
        self, test_set: _ServedSet, server: TranscriptionServer, model: ServedModel, options: ServedOptions
    ) -> None:
        self.decoded: list[DecodedUtterance] = []
        self._set = test_set
        self._server = server
        self._model = model
        self._options = options
        durations = test_set.index.duration_seconds
        self._waiting = iter((-durations).argsort(kind="stable").tolist())
        self._progress = progress_of_command(f"evaluate {test_set.name}", len(test_set.index))

    async def run(self, kept: KeptTranscripts) -> None:
        with self._progress:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self._model.concurrency):
                    tasks.create_task(self._work(kept))

    async def _work(self, kept: KeptTranscripts) -> None:
        for utterance_id in self._waiting:
            stored, pcm = await asyncio.to_thread(self._set.load, utterance_id)
            if utterance_id not in kept.texts:
                kept.add(utterance_id, await self._ask(stored, pcm))
            self.decoded.append(self._utterance(utterance_id, stored, pcm, kept.texts[utterance_id]))
            self._progress.show(len(self.decoded))

    async def _ask(self, stored: StoredUtterance, pcm: Pcm) -> str:
        settings, limit = self._options.settings, None
        if self._model.sends_token_limit:
            limit = MIN_NEW_TOKENS + math.ceil(settings.max_tokens_per_second * len(pcm) / _SAMPLING_RATE)
        try:
            return await self._server.transcribe(_wav(pcm), self._language(stored), limit)
        except TranscriptionError as error:
            message = f"{self._server.url} {error} (utterance {stored.key} of `{self._set.name}`)"
            raise _RequestError(message, error.is_outage) from error

    def _language(self, stored: StoredUtterance) -> str | None:
        return None if self._options.detect_language else stored.language

    def _utterance(self, utterance_id: int, stored: StoredUtterance, pcm: Pcm, text: str) -> DecodedUtterance:
        detected_language, hypothesis = split_language_tag(text)
        fields = {name: stored.fields[name] for name in self._set.grouping.fields if name in stored.fields}
        return DecodedUtterance(
            utterance_id=utterance_id,
            key=stored.key,
            language=self._set.index.language(utterance_id),
            duration_seconds=round(len(pcm) / _SAMPLING_RATE, 4),
            reference=stored.text,
            hypothesis=hypothesis,
            # No server says so.
            hit_limit=False,
            detected_language=detected_language,
            asks_for_language=self._language(stored) is None,
            fields=fields,
        )


class _RequestError(Exception):
    """A request without a transcript, which ends the evaluation."""

    def __init__(self, message: str, is_outage: bool) -> None:
        super().__init__(message)
        self.is_outage = is_outage


class OutageError(UserError):
    """The server was away or busy for too long; the same command resumes."""

    exit_code = 75


async def _refuse_unknown_model(model: ServedModel) -> None:
    async with _server(model) as server:
        await server.refuse_unknown_model()


def _server(model: ServedModel) -> TranscriptionServer:
    return TranscriptionServer(model.url, model.name, model.concurrency, model.retry_seconds, model.api_key)


def _evaluate(
    test_set: _ServedSet, model: ServedModel, options: ServedOptions, used: Normalizer, out_dir: Path
) -> TestSetResult:
    question = {
        "server": masked(model.url),
        "model": model.name,
        "shards": [part.fingerprint for part in test_set.index.sets],
        "detect_language": options.detect_language,
        "max_tokens_per_second": options.settings.max_tokens_per_second if model.sends_token_limit else None,
    }
    started = time.monotonic()
    with KeptTranscripts(out_dir / test_set.partial_file, question) as kept:
        decoded = asyncio.run(_transcribe(test_set, model, options, kept))
    # The time of an earlier, interrupted evaluation is not known.
    seconds = None if kept.num_resumed else time.monotonic() - started
    result = _score_and_write(test_set, decoded, used, Measurements(decode_seconds=seconds), out_dir)
    kept.remove()
    return result


async def _transcribe(
    test_set: _ServedSet, model: ServedModel, options: ServedOptions, kept: KeptTranscripts
) -> list[DecodedUtterance]:
    async with _server(model) as server:
        work = _Transcription(test_set, server, model, options)
        try:
            await work.run(kept)
        except ExceptionGroup as group:
            error = group.exceptions[0]
            if not isinstance(error, _RequestError):
                raise error from None
            message = (
                f"{error}. Kept in {kept.path}: {len(kept.texts)} of {counted(len(test_set.index), 'transcript')}. "
                "Run the same command again to resume, or remove the file to begin again."
            )
            raise (OutageError if error.is_outage else UserError)(message) from error
    return sorted(work.decoded, key=lambda utterance: utterance.utterance_id)


def _score_and_write(
    test_set: _ServedSet, decoded: Sequence[DecodedUtterance], used: Normalizer, measured: Measurements, out_dir: Path
) -> TestSetResult:
    test_set.grouping.warn_of_unknown(test_set.name, decoded)
    try:
        utterances = [score_utterance(utterance, used) for utterance in decoded]
    except RankError as error:
        # There is only one process.
        raise UserError(str(error)) from error
    result = score_test_set(utterances, used, None, test_set.grouping, measured)
    with write_errors_named(f"The results of `{test_set.name}`", out_dir):
        write_results(out_dir, test_set.name, utterances, result)
    return result


def _wav(pcm: Pcm) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, pcm, _SAMPLING_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()

"""A served model is measured as the model itself, and an evaluation outlives a server that is busy or away."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile

from corpora import tone, write_lines
from transcription_endpoint import ByTransformers, TranscriptionEndpoint, transcription_endpoint

NUM_UTTERANCES = 26


def echo(fields: dict[str, str], contents: bytes) -> str:
    """A transcript that depends on everything in a request; without a language it begins with a tag."""
    assert (fields["model"], fields["response_format"]) == ("served", "json")
    waveform, sampling_rate = soundfile.read(io.BytesIO(contents), dtype="int16")
    said = f"{len(waveform)} samples at {sampling_rate}, {fields.get('max_completion_tokens')} tokens"
    return f"{said} {fields['language']}" if "language" in fields else f"lang:de{said}"


@pytest.fixture
def endpoint() -> Iterator[TranscriptionEndpoint]:
    with transcription_endpoint(echo) as served:
        yield served


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "speech.jsonl").read_text().splitlines()]


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "speech.json").read_text())
    return result


def test_the_hypotheses_of_a_server_are_those_of_the_model(run, tiny_model, shard_folder, tmp_path):
    options = ["--max-tokens-per-second", "1", "--slices", "speaker"]
    assert run("evaluate", tiny_model, shard_folder, "--out", tmp_path / "offline", *options).code == 0
    with transcription_endpoint(ByTransformers(tiny_model)) as served:
        served.faults = ["429", "cut", "503", "500"]
        result = run("evaluate", "served", shard_folder, "--server", served.url, "--out", tmp_path / "served", *options)
    assert result.code == 0
    assert len(served.requests) == NUM_UTTERANCES + 4
    offline, online = rows_of(tmp_path / "offline"), rows_of(tmp_path / "served")
    assert len({row["hypothesis"] for row in offline}) > NUM_UTTERANCES // 2, "the model tells them apart"
    # Servers do not say what ended a transcript.
    assert online == [row | {"hit_limit": False} for row in offline]
    own = ("decode_seconds", "rtfx", "loss", "perplexity", "num_limit_hits")
    theirs, ours = result_of(tmp_path / "offline"), result_of(tmp_path / "served")
    assert {key: value for key, value in ours.items() if key not in own} == {
        key: value for key, value in theirs.items() if key not in own
    }
    assert ours["rtfx"] == pytest.approx(ours["audio_seconds"] / ours["decode_seconds"])
    compared = run("score", tmp_path / "offline" / "speech.jsonl", tmp_path / "served" / "speech.jsonl")
    assert compared.code == 0
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == ["speech.json", "speech.jsonl"]


def test_requests_name_the_language_or_leave_it_to_the_model(run, endpoint, shard_folder, tmp_path):
    options = ["--server", f"{endpoint.url}/v1/", "--out", tmp_path]
    assert run("evaluate", "served", shard_folder, *options).code == 0
    rows = rows_of(tmp_path)
    assert {row["language"] for row in rows} == {"de", "en", "fr", None}
    for row in rows:
        assert row["hypothesis"].endswith(f" {row['language']}" if row["language"] else " tokens")
        assert row["detected_language"] == (None if row["language"] else "de")
        num_samples, said = row["hypothesis"].split(" ", 1)
        # Rows round to a tenth of a millisecond.
        assert abs(int(num_samples) - 16_000 * row["duration_seconds"]) < 1
        assert said.startswith(f"samples at 16000, {16 + math.ceil(12.5 * int(num_samples) / 16_000)} tokens")
    assert run("evaluate", "served", shard_folder, *options, "--detect-language", "--no-token-limit").code == 0
    assert all(" None tokens" in row["hypothesis"] and row["detected_language"] == "de" for row in rows_of(tmp_path))
    languages = result_of(tmp_path)["language_identification"]
    assert (languages["num_utterances"], languages["num_correct"]) == (20, 7)


def test_as_many_requests_are_in_flight_as_were_asked_for(run, shard_folder, tmp_path):
    together = threading.Barrier(5, timeout=30)
    in_flight, most = [0], [0]
    lock = threading.Lock()

    def transcribe(fields: dict[str, str], contents: bytes) -> str:
        with lock:
            in_flight[0] += 1
            most[0] = max(most[0], in_flight[0])
            is_first = most[0] <= 5 and not together.broken
        if is_first and len(served.requests) <= 5:
            together.wait()
        with lock:
            in_flight[0] -= 1
        return "one"

    with transcription_endpoint(transcribe) as served:
        options = ["--server", served.url, "--concurrency", "5", "--out", tmp_path]
        assert run("evaluate", "served", shard_folder, *options).code == 0
    assert most == [5]


def test_a_refused_request_ends_the_evaluation_and_the_same_command_resumes(run, endpoint, shard_folder, tmp_path):
    options = ["--server", endpoint.url.replace("//", "//me:password@"), "--concurrency", "2"]
    assert run("evaluate", "served", shard_folder, *options, "--out", tmp_path / "whole").code == 0
    asked = len(endpoint.requests)
    endpoint.transcribe = lambda fields, contents: refuse_after(endpoint, asked + 10, fields, contents)
    refused = run("evaluate", "served", shard_folder, *options, "--out", tmp_path / "parts").refusal()
    shown = endpoint.url.replace("//", "//***@")
    assert f"{shown} answered HTTP 400: injected 400 (utterance " in refused
    partial = tmp_path / "parts" / "speech.partial.jsonl"
    assert "password" not in partial.read_text()
    kept = len(partial.read_text().splitlines()) - 1
    assert f"Kept in {partial}: {kept} of 26 transcripts. Run the same command again to resume" in refused
    assert 8 <= kept <= 11
    # A line that was cut off when the process was killed.
    with partial.open("a") as file:
        file.write('{"utterance_id": 2')
    endpoint.transcribe, endpoint.lasting_fault = echo, None
    asked = len(endpoint.requests)
    assert run("evaluate", "served", shard_folder, *options, "--out", tmp_path / "parts").code == 0
    # The request that was under way when the other one was refused may have been counted after that.
    assert len(endpoint.requests) - asked - (NUM_UTTERANCES - kept) in (0, 1)
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    # How long the first part took is not known.
    assert result_of(tmp_path / "parts")["decode_seconds"] is None
    assert not partial.exists()


def refuse_after(endpoint: TranscriptionEndpoint, number: int, fields: dict[str, str], contents: bytes) -> str:
    if len(endpoint.requests) >= number:
        endpoint.lasting_fault = "400"
    return echo(fields, contents)


def test_transcripts_of_another_question_are_not_taken(run, endpoint, shard_folder, tmp_path):
    options = ["--server", endpoint.url, "--concurrency", "1", "--out", tmp_path]
    endpoint.transcribe = lambda fields, contents: refuse_after(endpoint, 3, fields, contents)
    assert run("evaluate", "served", shard_folder, *options).code == 2
    endpoint.transcribe, endpoint.lasting_fault = echo, None
    assert run("evaluate", "served", shard_folder, *options, "--detect-language").code == 0
    assert all(row["hypothesis"].endswith(" tokens") for row in rows_of(tmp_path))


@pytest.mark.parametrize("fault", ["503", "cut", "garbled"])
def test_an_outage_ends_with_one_message(fault, run, endpoint, shard_folder, tmp_path):
    endpoint.lasting_fault = fault
    options = ["--server", endpoint.url, "--retry-seconds", "0.2", "--out", tmp_path]
    refused = run("evaluate", "served", shard_folder, *options).refusal(75)
    assert "and answered nothing else for too long" in refused
    assert (f"answered HTTP 503: injected {fault}" if fault == "503" else "cannot be reached (") in refused
    assert ": 0 of 26 transcripts. Run the same command again" in refused
    assert len(endpoint.requests) > NUM_UTTERANCES


def test_a_full_disk_ends_with_one_message(run, endpoint, shard_folder, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("voxtral_dist.serving.kept_transcripts.write_atomically", full)
    refused = run("evaluate", "served", shard_folder, "--server", endpoint.url, "--out", tmp_path).refusal(74)
    assert f"Transcripts cannot be written to {tmp_path / 'speech.partial.jsonl'}: no space left" in refused
    assert endpoint.requests == []


def test_what_a_server_cannot_measure_is_refused_before_a_request(run, endpoint, shard_folder, tmp_path, monkeypatch):
    def refused(*arguments: object, model: str = "served", url: str = endpoint.url) -> str:
        message: str = run("evaluate", model, *arguments, "--server", url, "--out", tmp_path).refusal()
        return message

    endpoint.names = ["base", "adapter"]
    assert f"{endpoint.url} serves no `served`, but `base`, `adapter`: name the model" in refused(shard_folder)
    for url in (
        "localhost:8000",
        "http://host:port",
        "http://[::1",
        "http://host:99999",
        f"{endpoint.url}/?model=1",
        "",
    ):
        assert f"must be a URL such as http://localhost:8000, but is {url!r}" in refused(shard_folder, url=url)
    with transcription_endpoint(echo) as stopped:
        pass
    assert f"{stopped.url} cannot be reached (" in refused(shard_folder, url=stopped.url)
    for option in (["--beams", "2"], ["--batch-size", "1"], ["--no-loss"], ["--precision", "float32"], ["--ema"]):
        assert f"`{option[0]}` does nothing with `--server`" in refused(shard_folder, *option)
    (tmp_path / "words.txt").write_text("bottles\n")
    assert "`voxtral-dist score --words`" in refused(shard_folder, "--words", tmp_path / "words.txt")
    assert "`--concurrency` needs `--server`" in run("evaluate", "m", shard_folder, "--concurrency", "3").refusal()
    soundfile.write(tmp_path / "clip.wav", tone(0.5), 16_000)
    manifest = write_lines(tmp_path / "m.jsonl", [{"audio_filepath": "clip.wav", "text": "Yes.", "lang": "en"}])
    assert run("shards", "pack", manifest, tmp_path / "asked", "--instruction", "Is it loud?").code == 0
    assert "`asked`: its texts are answers to instructions" in refused(tmp_path / "asked")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without a launcher" in refused(shard_folder)
    assert endpoint.requests == []


def test_an_answer_that_is_no_transcript_is_refused_and_a_key_is_sent(
    run, endpoint, shard_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    endpoint.lasting_fault = "page"
    refused = run("evaluate", "served", shard_folder, "--server", endpoint.url, "--out", tmp_path).refusal()
    assert "answered '<html>a login page</html>', and not a transcript" in refused
    assert set(endpoint.authorizations) == {"Bearer secret"}


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("moved", " to https://new.example/v1/audio/transcriptions (name the server that answers itself)"),
        ("401", "answered HTTP 401: injected 401 (it wants the API key in the environment variable VLLM_API_KEY)"),
    ],
)
def test_a_refusal_of_a_server_says_what_to_do(fault, sentence, run, endpoint, shard_folder, tmp_path):
    endpoint.lasting_fault = fault
    assert sentence in run("evaluate", "served", shard_folder, "--server", endpoint.url, "--out", tmp_path).refusal()


def test_a_server_that_never_lists_its_models_is_given_up(run, endpoint, shard_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("voxtral_dist.serving.transcription_server._LIST_SECONDS", 0.2)
    endpoint.may_list.clear()
    refused = run("evaluate", "served", shard_folder, "--server", endpoint.url, "--out", tmp_path).refusal()
    endpoint.may_list.set()
    assert f"{endpoint.url} cannot be reached (ReadTimeout)" in refused


def test_keys_are_sent_without_their_line_break_and_never_shown(run, endpoint, shard_folder, tmp_path, monkeypatch):
    options = ["--server", endpoint.url, "--out", tmp_path]
    for key in ("sécret", "sec\nret"):
        monkeypatch.setenv("VLLM_API_KEY", key)
        refused = run("evaluate", "served", shard_folder, *options).refusal()
        assert "VLLM_API_KEY" in refused
        assert key not in refused
    monkeypatch.setenv("VLLM_API_KEY", "secret\n")
    endpoint.transcribe = lambda fields, contents: "half a pair: \ud83d"
    assert run("evaluate", "served", shard_folder, *options).code == 0
    assert set(endpoint.authorizations) == {"Bearer secret"}
    assert {row["hypothesis"] for row in rows_of(tmp_path)} == {"half a pair: ?"}


def test_a_machine_without_torch_measures_a_server(endpoint, shard_folder, tmp_path):
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from voxtral_dist.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", program, "evaluate", "served", shard_folder, "--server", endpoint.url]
    environment = os.environ | {"NO_PROXY": "127.0.0.1"}
    ended = subprocess.run([*command, "--out", tmp_path], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("speech: WER ")

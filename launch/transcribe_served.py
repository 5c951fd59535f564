"""Transcribe audio files by a served Voxtral: `python launch/transcribe_served.py --model NAME --language en FILES...`.

A client to copy from: it needs `requests`, `soundfile` and `soxr`, and nothing of this repository. Where voxtral-dist
is installed, its reader is used, so that whatever can be packed for training can be sent. The server gets what training
and evaluation give to the model: mono audio at 16 kHz in 16 bits, resampled by soxr; the language as an ISO 639-1 code,
or none to let the model detect it; and greedy decoding. From these, vLLM makes the prompt of training by
mistral-common: `<s>[INST][BEGIN_AUDIO][AUDIO]...[/INST]lang:en[TRANSCRIBE]`.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

import numpy as np
import requests
import soundfile
import soxr
from requests.adapters import HTTPAdapter
from urllib3 import Retry

SAMPLING_RATE = 16_000
# As in evaluations: fast speech has fewer than 12.5 tokens in a second.
FIXED_TOKENS, TOKENS_PER_SECOND = 16, 12.5
LANGUAGE_TAG = re.compile(r"^\s*lang:([a-z]{2})")


def main() -> None:
    """Print a line of each file: its name, the detected language where none was given, and the transcript."""
    parser = argparse.ArgumentParser(description="Transcribe audio files by a served Voxtral.")
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--server", default="http://localhost:8000", help="default: %(default)s")
    parser.add_argument("--model", required=True, help="the name that `vllm serve` or `--lora-modules` gives it")
    parser.add_argument("--language", help="ISO 639-1 code; without it, the model detects the language")
    parser.add_argument("--api-key")
    parsed = parser.parse_args()
    with patient_session(parsed.api_key) as session:
        for path in parsed.files:
            try:
                text = transcribe(session, parsed.server, parsed.model, read_pcm(path), parsed.language)
            except (OSError, ValueError, soundfile.SoundFileError) as error:
                raise SystemExit(f"{path}: {error}") from error
            detected, transcript = split_language(text)
            print(f"{path}\t{detected}\t{transcript}" if detected else f"{path}\t{transcript}")


def patient_session(api_key: str | None = None) -> requests.Session:
    """A session that sends a request again while the server is busy or restarts, for up to a minute."""
    session = requests.Session()
    retries = Retry(total=7, backoff_factor=0.5, status_forcelist=[429, 502, 503, 504], allowed_methods=None)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retries))
    if api_key is not None:
        session.headers["Authorization"] = f"Bearer {api_key}"
    return session


def read_pcm(path: Path) -> np.ndarray:
    """The samples of a file as mono int16 at 16 kHz, as training reads them.

    Raises:
        OSError: the file cannot be read.
        ValueError: voxtral-dist cannot decode it.
        soundfile.SoundFileError: libsndfile cannot decode it, and voxtral-dist is not installed.
    """
    contents = path.read_bytes()
    try:
        from voxtral_dist.data.stored.audio import AudioError, decode_pcm
    except ImportError:
        return read_pcm_by_soundfile(contents)
    try:
        return decode_pcm(contents, SAMPLING_RATE)
    except AudioError as error:
        raise ValueError(f"the file {error}") from error


def read_pcm_by_soundfile(contents: bytes) -> np.ndarray:
    """Decode to the same samples by soundfile alone, which knows WAV, FLAC, MP3, Ogg and Opus, if they are intact."""
    waveform, sampling_rate = soundfile.read(io.BytesIO(contents), dtype="float32", always_2d=True)
    mono = waveform.mean(axis=1)
    if sampling_rate != SAMPLING_RATE:
        mono = soxr.resample(mono, sampling_rate, SAMPLING_RATE, quality="HQ")
    return np.clip(np.rint(mono * 32768), -32768, 32767).astype(np.int16)


def transcribe(session: requests.Session, server: str, model: str, pcm: np.ndarray, language: str | None = None) -> str:
    """The server's transcript of a recording; without a language, the model's tag `lang:xx` may stand before it.

    Raises:
        requests.RequestException: the server cannot be reached, or its answer is no JSON.
    """
    wav = io.BytesIO()
    soundfile.write(wav, pcm, SAMPLING_RATE, format="WAV", subtype="PCM_16")
    fields = {
        "model": model,
        "temperature": "0",
        "response_format": "json",
        # A field of vLLM's own, against endless repetitions.
        "max_completion_tokens": str(FIXED_TOKENS + int(np.ceil(TOKENS_PER_SECOND * len(pcm) / SAMPLING_RATE))),
    }
    if language is not None:
        fields["language"] = language
    answer = session.post(
        f"{server.rstrip('/').removesuffix('/v1')}/v1/audio/transcriptions",
        data=fields,
        files={"file": ("audio.wav", wav.getvalue(), "audio/wav")},
        timeout=600,
    )
    if not answer.ok:
        raise SystemExit(f"HTTP {answer.status_code}: {answer.text}")
    return str(answer.json()["text"])


def split_language(text: str) -> tuple[str | None, str]:
    """The language that the model named before its transcript, and the transcript."""
    tag = LANGUAGE_TAG.match(text)
    return (tag[1], text[tag.end() :].strip()) if tag else (None, text.strip())


if __name__ == "__main__":
    main()

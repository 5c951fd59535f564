"""The client script sends what training gives to the model."""

from __future__ import annotations

import io
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from voxtral_dist.data.stored.audio import decode_pcm

from corpora import tone
from transcription_endpoint import transcription_endpoint

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "transcribe_served.py"


@pytest.fixture(params=["with", "without"])
def package(request, monkeypatch) -> str:
    """The client beside the package, or copied to a machine without it."""
    if request.param == "without":
        monkeypatch.setitem(sys.modules, "voxtral_dist.data.stored.audio", None)
    return request.param


def test_the_client_sends_the_samples_of_training_and_waits_for_a_busy_server(
    tmp_path, monkeypatch, capsys, package
) -> None:
    stereo = np.stack([tone(1.1, 44_100), tone(1.1, 44_100, seed=1)], axis=1)
    soundfile.write(tmp_path / "stereo.flac", stereo, 44_100)
    soundfile.write(tmp_path / "mono.wav", tone(0.7), 16_000)
    received = []

    def transcribe(fields: dict[str, str], contents: bytes) -> str:
        pcm, sampling_rate = soundfile.read(io.BytesIO(contents), dtype="int16")
        received.append((fields, pcm, sampling_rate))
        return " Hello." if "language" in fields else "lang:frBonjour."

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    files = [str(tmp_path / "stereo.flac"), str(tmp_path / "mono.wav")]
    with transcription_endpoint(transcribe) as served:
        options = ["--server", f"{served.url}/v1/", "--model", "mine", "--api-key", "secret"]
        for language in (["--language", "en"], []):
            served.faults = ["503"]
            monkeypatch.setattr(sys, "argv", [str(SCRIPT), *files, *options, *language])
            runpy.run_path(str(SCRIPT), run_name="__main__")
        served.faults = ["400"]
        with pytest.raises(SystemExit, match=r"HTTP 400: .*injected 400"):
            runpy.run_path(str(SCRIPT), run_name="__main__")
        served.faults = ["page"]
        with pytest.raises(SystemExit, match=r"stereo\.flac: Expecting value"):
            runpy.run_path(str(SCRIPT), run_name="__main__")
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(SCRIPT), *options])
        with pytest.raises(SystemExit, match=r"transcribe_served\.py: .*(does not decode|Format not recognised)"):
            runpy.run_path(str(SCRIPT), run_name="__main__")
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "nowhere.wav", *options])
        with pytest.raises(SystemExit, match=r"nowhere\.wav: .*No such file"):
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert set(served.authorizations) == {"Bearer secret"}
    assert capsys.readouterr().out.splitlines() == [
        *(f"{path}\tHello." for path in files),
        *(f"{path}\tfr\tBonjour." for path in files),
    ]
    for (fields, pcm, sampling_rate), path in zip(received, files * 2, strict=True):
        assert sampling_rate == 16_000
        assert np.array_equal(pcm, decode_pcm(Path(path).read_bytes(), 16_000))
        asked = {"model": "mine", "temperature": "0", "response_format": "json"}
        assert fields.items() >= asked.items()
        assert int(fields["max_completion_tokens"]) == 16 + np.ceil(12.5 * len(pcm) / 16_000)


def test_beside_the_package_the_client_sends_what_only_the_package_decodes(tmp_path) -> None:
    read_pcm = runpy.run_path(str(SCRIPT))["read_pcm"]
    left = tone(0.5)
    soundfile.write(tmp_path / "inverted.wav", np.stack([left, -left], axis=1), 16_000)
    assert np.array_equal(read_pcm(tmp_path / "inverted.wav"), left)
    unsized = io.BytesIO()
    soundfile.write(unsized, left, 16_000, format="WAV", subtype="PCM_16")
    contents = bytearray(unsized.getvalue())
    size_at = contents.index(b"data") + 4
    contents[size_at : size_at + 4] = bytes(4)
    (tmp_path / "unsized.wav").write_bytes(contents)
    assert np.array_equal(read_pcm(tmp_path / "unsized.wav"), left)
    pytest.importorskip("av", reason="the extra `media` is not installed")
    from media_files import encoded

    (tmp_path / "clip.mov").write_bytes(encoded("mov", "alac", 16_000))
    assert np.array_equal(read_pcm(tmp_path / "clip.mov"), tone(1.0))

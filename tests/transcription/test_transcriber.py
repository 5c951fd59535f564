"""Transcripts in Python: of files, bytes, arrays and cells of datasets, short and long."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from voxtral_dist import Question, RecordingError, RecordingTranscript, Transcriber, UserError
from voxtral_dist.data.stored.audio import resample

from corpora import tone


@pytest.fixture(scope="module")
def transcriber(tiny_model) -> Transcriber:
    return Transcriber.from_pretrained(str(tiny_model), device="cpu", batch_size=2)


def test_a_recording_has_one_transcript_in_every_form(transcriber, tmp_path):
    pcm = tone(2.0)
    soundfile.write(tmp_path / "one.flac", pcm, 16_000)
    path = tmp_path / "one.flac"
    floats = pcm / np.float32(32768)
    forms = [path, str(path), path.read_bytes(), pcm, floats, {"array": floats, "sampling_rate": 16_000}]
    texts = transcriber.transcribe(forms, "en")
    assert len(texts) == len(forms)
    assert len(set(texts)) == 1
    assert texts[0]


def test_arrays_of_another_rate_are_resampled(transcriber):
    floats = tone(1.0, 8_000) / np.float32(32768)
    expected = transcriber.transcribe([resample(floats, 8_000, 16_000)], "en")
    assert transcriber.transcribe([floats], "en", sampling_rate=8_000) == expected
    assert transcriber.transcribe([{"array": floats, "sampling_rate": 8_000}], "en") == expected


def test_segments_of_a_long_recording_are_decoded_like_recordings_of_their_own(transcriber):
    pcm = tone(20.0)
    (whole,) = transcriber.transcripts([pcm], Question("en"), max_segment_seconds=3.0)
    assert isinstance(whole, RecordingTranscript)
    assert len(whole.segments) > 6
    places = [round(16_000 * segment.start_seconds) for segment in whole.segments] + [len(pcm)]
    parts = [pcm[start:end] for start, end in pairwise(places)]
    assert transcriber.transcribe(parts, "en") == [segment.text for segment in whole.segments]


def test_one_recording_that_cannot_be_read_is_raised_or_yielded(transcriber):
    recordings = [tone(0.5), b"no audio", Path("nowhere.wav"), tone(0.5)]
    first, second, third, fourth = transcriber.transcripts(recordings)
    assert isinstance(second, RecordingError)
    assert str(second).startswith("The recording does not decode")
    assert str(third) == "The recording nowhere.wav cannot be read: No such file or directory."
    assert first == fourth
    with pytest.raises(RecordingError, match="does not decode"):
        transcriber.transcribe(recordings)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8), dtype=np.float32), r"shape \(num_samples,\), but has the shape \(2, 8\)"),
        (np.zeros(0, dtype=np.float32), r"but has the shape \(0,\)"),
        (np.zeros(8, dtype=np.int32), "floats in \\[-1, 1\\] or of int16, but is one of int32"),
        (np.full(8, np.inf), "not finite"),
    ],
)
def test_arrays_that_are_no_audio_are_refused(transcriber, array, message):
    with pytest.raises(RecordingError, match=message):
        transcriber.transcribe([array])


def test_questions_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="the language 'klingon', which is not an ISO 639-1 code such as 'en'"):
        Question("klingon")
    with pytest.raises(UserError, match="An instruction replaces the request to transcribe"):
        Question("en", instruction="What is this?")

"""Audio is decoded to the waveform that was encoded, at the model's sampling rate; unusable audio is an error."""

import io

import numpy as np
import pytest
import soundfile
import soxr

from voxtral_dist.data.stored.audio import AudioError, decode_audio, resample, to_pcm

from corpora import tone

RATE = 16_000


def encoded(waveform: np.ndarray, sampling_rate: int, audio_format: str = "WAV", subtype: str | None = None) -> bytes:
    contents = io.BytesIO()
    soundfile.write(contents, waveform, sampling_rate, format=audio_format, subtype=subtype)
    return contents.getvalue()


@pytest.mark.parametrize("audio_format", ["WAV", "FLAC"])
def test_16_bit_audio_arrives_bit_for_bit(audio_format):
    clip = tone(0.7)
    assert np.array_equal(to_pcm(decode_audio(encoded(clip, RATE, audio_format), RATE)), clip)


@pytest.mark.parametrize("num_samples", [1, 4001, 8000])
def test_audio_of_another_rate_is_resampled_as_mistral_common_does(num_samples):
    clip = tone(1.0, 8000)[:num_samples]
    heard = decode_audio(encoded(clip, 8000), RATE)
    assert heard.dtype == np.float32
    assert abs(len(heard) - num_samples / 8000 * RATE) <= 1
    np.testing.assert_array_equal(heard, soxr.resample(clip / np.float32(32768), 8000, RATE, quality="HQ"))


def test_audio_of_the_right_rate_is_not_touched():
    waveform = np.linspace(-1, 1, 100, dtype=np.float32)
    assert resample(waveform, RATE, RATE) is waveform


def test_channels_are_averaged():
    left, right = tone(0.3, seed=1), tone(0.3, seed=2)
    heard = decode_audio(encoded(np.stack([left, right], axis=1), RATE), RATE)
    np.testing.assert_allclose(heard, (left / 32768 + right / 32768) / 2, atol=1e-7)


def test_pcm_is_clipped_not_wrapped():
    assert to_pcm(np.array([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=np.float32)).tolist() == [-32768, -32768, 0, 32767, 32767]


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        (b"", "does not decode"),
        (b"not audio at all", "does not decode"),
        (encoded(np.zeros(0, dtype=np.int16), RATE), "contains no audio"),
        (encoded(np.array([0.0, np.nan, 0.1]), RATE, subtype="FLOAT"), "not finite"),
        (encoded(np.array([0.0, np.inf, 0.1]), RATE, subtype="FLOAT"), "not finite"),
    ],
    ids=["nothing", "text", "no samples", "not a number", "infinity"],
)
def test_unusable_audio_is_an_audio_error(contents, sentence):
    with pytest.raises(AudioError, match=sentence) as refused:
        decode_audio(contents, RATE)
    assert " at 0x" not in str(refused.value), "a memory address is useless in a message"

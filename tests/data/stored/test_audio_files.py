"""Audio files as recorders, editors and telephones leave them: all of their sound is decoded, or they are refused."""

import io
import struct
from contextlib import suppress

import numpy as np
import pytest
import soundfile

from voxtral_dist.data.stored import audio_source
from voxtral_dist.data.stored.audio import AudioError, decode_audio, decode_pcm
from voxtral_dist.data.stored.checks import Cause, is_silent
from voxtral_dist.data.stored.mp3_frames import find_mp3_frames
from voxtral_dist.shards.corpus.audio_location import AudioLocation

from corpora import tone

RATE = 16_000


def encoded(samples: np.ndarray, rate: int = RATE, **how: object) -> bytes:
    contents = io.BytesIO()
    soundfile.write(contents, samples, rate, **how)
    return contents.getvalue()


def mp3(seconds: float = 1.0, rate: int = RATE, num_channels: int = 1, **how: object) -> bytes:
    return encoded(np.stack([tone(seconds, rate)] * num_channels, axis=1), rate, format="MP3", **how)


def without_xing(contents: bytes, bit_rate: int = 128_000, rate: int = 44_100) -> bytes:
    first = 144 * bit_rate // rate + (contents[2] >> 1 & 1)
    assert b"Xing" in contents[:first]
    assert contents[first] == 0xFF
    return contents[first:]


def variable_mp3() -> bytes:
    """Four seconds of noise, then four of nearly nothing, so that the first frames are far larger than the last."""
    noise = np.random.default_rng(0).uniform(-0.8, 0.8, 4 * 44_100)
    samples = np.concatenate([noise, 0.002 * noise])
    return encoded(samples, 44_100, format="MP3", bitrate_mode="VARIABLE", compression_level=0.0)


def wav(data: bytes, data_bytes: int, riff_bytes: int, sizes: bytes = b"", tag: bytes = b"RIFF") -> bytes:
    form = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    return tag + struct.pack("<I", riff_bytes) + b"WAVE" + sizes + form + b"data" + struct.pack("<I", data_bytes) + data


ID3_OF_1000 = b"ID3\x03\0\0\0\0\x07\x68" + bytes(1000)


@pytest.mark.parametrize(
    ("contents", "seconds"),
    [
        (mp3(1.0) + mp3(2.0), 3.0),
        (mp3(1.0) + mp3(1.0) + mp3(1.0), 3.0),
        (mp3(1.0) + bytes(3000) + ID3_OF_1000 + mp3(1.0), 2.0),
        (mp3(1.0) + b"TAG" + bytes(125) + mp3(1.0), 2.0),
        (bytes(4096) + mp3(1.0), 1.0),
        (ID3_OF_1000 + bytes(2000) + mp3(1.0), 1.0),
        (ID3_OF_1000 + mp3(1.0) + b"TAG" + bytes(125), 1.0),
        (b"not a frame" * 9 + mp3(2.0), 2.0),
        (without_xing(variable_mp3()), 8.0),
        (mp3(1.0, 8_000, 2) + mp3(2.0, 8_000, 2), 3.0),
        (mp3(1.0, 44_100) + mp3(1.0, 44_100), 2.0),
    ],
    ids=[
        "joined",
        "three",
        "tag between",
        "id3v1 between",
        "zeros",
        "padding",
        "tags",
        "text",
        "vbr",
        "8 kHz",
        "44 kHz",
    ],
)
def test_all_frames_of_an_mp3_are_decoded(contents, seconds):
    assert len(decode_pcm(contents, RATE)) / RATE == pytest.approx(seconds, abs=0.25)


def test_what_libsndfile_reads_whole_stays_as_it_is():
    for contents in (mp3(1.0), variable_mp3(), ID3_OF_1000 + mp3(1.0), mp3(1.0, bitrate_mode="CONSTANT")):
        frames = find_mp3_frames(contents)
        assert frames is not None
        assert frames.is_plain
        expected, rate = soundfile.read(io.BytesIO(contents), dtype="float32")
        np.testing.assert_allclose(decode_audio(contents, rate), expected, atol=1e-6)


def test_joined_files_sound_like_their_parts():
    parts = [mp3(1.0), encoded(tone(1.0, seed=3)[::-1].copy(), format="MP3")]
    heard = decode_audio(parts[0] + parts[1], RATE)
    for number, part in enumerate(parts):
        middle = decode_audio(part, RATE)[4000:12_000]
        place = int(np.correlate(heard, middle).argmax())
        assert abs(place - 4000 - number * RATE) < 0.2 * RATE
        assert np.corrcoef(heard[place : place + len(middle)], middle)[0, 1] > 0.999


def test_an_mp3_that_changes_inside_is_refused_without_pyav(monkeypatch):
    monkeypatch.setattr(audio_source, "can_decode_media", lambda: False)
    for other in (mp3(1.0, 24_000), mp3(1.0, RATE, 2)):
        with pytest.raises(AudioError, match=r"changes inside: install `voxtral-dist\[media\]`"):
            decode_pcm(mp3(1.0) + other, RATE)


@pytest.mark.parametrize(
    "contents", [b"\xff\xfb" * 5000, np.random.default_rng(0).bytes(20_000), b"", b"\xff", bytes(99)]
)
def test_other_bytes_are_no_mp3(contents):
    assert find_mp3_frames(contents) is None


@pytest.mark.parametrize(
    ("data_bytes", "riff_bytes"),
    [(0, 0), (0, 36), (2**32 - 1, 2**32 - 1), (2**31 - 4096, 2**31 - 4060), (0, 2**32 - 1)],
)
def test_a_recording_whose_sizes_were_never_written_is_read_to_its_end(data_bytes, riff_bytes):
    notes: list[str] = []
    pcm = tone(0.5)
    assert np.array_equal(decode_pcm(wav(pcm.tobytes(), data_bytes, riff_bytes), RATE, notes.append), pcm)
    assert notes == []


@pytest.mark.parametrize("size", [0, 2**64 - 1])
def test_rf64_without_sizes_is_read_to_its_end(size):
    pcm = tone(0.5)
    sizes = b"ds64" + struct.pack("<IQQQI", 28, size, size, size, 0)
    contents = wav(pcm.tobytes(), 2**32 - 1, 2**32 - 1, sizes, b"RF64")
    assert np.array_equal(decode_pcm(contents, RATE), pcm)


def test_damaged_files_are_audio_errors_or_audio():
    """Bytes are changed, left out and repeated in headers and elsewhere."""
    draw = np.random.default_rng(0)
    pcm = tone(0.2)
    wholes = [mp3(0.2) * 2, wav(pcm.tobytes(), 0, 0), wav(pcm.tobytes(), 2 * len(pcm), 0), encoded(pcm, format="OGG")]
    for number in range(400):
        contents = bytearray(wholes[number % len(wholes)])
        for place in draw.integers(0, 200 if number % 3 else len(contents), 3):
            contents[place] = draw.integers(0, 256)
        start, length = draw.integers(0, len(contents)), draw.integers(0, 300)
        contents[start : start + length] = contents[:length] if number % 2 else b""
        with suppress(AudioError):
            assert len(decode_pcm(bytes(contents), RATE)) < 60 * RATE


def test_an_empty_recording_stays_empty():
    for rest in (b"", b"LIST" + struct.pack("<I", 4) + b"INFO"):
        with pytest.raises(AudioError, match="contains no audio"):
            decode_pcm(wav(rest, 0, 36 + len(rest)), RATE)


def test_audio_that_ends_before_it_says_so_is_noted():
    pcm = tone(2.0)
    plain = wav(pcm.tobytes(), 2 * len(pcm), 2 * len(pcm) + 36)
    whole = {"OGG": encoded(tone(12.0), format="OGG"), "MP3": mp3(2.0), "WAV": plain}
    for name, contents in whole.items():
        notes: list[str] = []
        decode_pcm(contents, RATE, notes.append)
        assert notes == []
        heard = decode_audio(contents[: len(contents) // 2], RATE, notes.append)
        assert len(heard) < 0.7 * len(decode_audio(contents, RATE))
        assert len(notes) == 1, name
    assert notes[0].startswith("ends after 1.0")
    assert notes[0].endswith("s that its header claims")


@pytest.mark.parametrize("rate", [176_400, 192_000, 384_000])
def test_rates_of_studios_are_read(rate):
    assert len(decode_pcm(encoded(tone(0.25, rate), rate, format="WAV", subtype="PCM_24"), RATE)) == RATE // 4


def test_codecs_that_cannot_seek_are_read_whole_and_in_parts(tmp_path):
    contents = encoded(tone(1.0, 8_000), 8_000, format="WAV", subtype="GSM610")
    whole = decode_pcm(contents, 8_000)
    assert len(whole) >= 8_000
    part = AudioLocation("call.wav", contents, 0.25, 0.5).read()
    assert np.array_equal(decode_pcm(part, 8_000), whole[2_000:6_000])


def test_parts_of_repaired_files_are_cut_where_they_are_heard(tmp_path):
    contents = mp3(2.0) + mp3(2.0)
    whole = decode_pcm(contents, RATE)
    (tmp_path / "a.mp3").write_bytes(contents)
    for start in (0.5, 3.0):
        part = decode_pcm(AudioLocation(str(tmp_path / "a.mp3"), None, start, 0.5).read(), RATE)
        assert np.abs(part.astype(int) - whole[round(start * RATE) :][: RATE // 2]).max() <= 1


@pytest.mark.parametrize("right", [-1.0, -0.95])
def test_channels_that_cancel_each_other_are_heard(right):
    left = tone(1.0).astype(np.float64) / 32768
    contents = encoded(np.stack([left, right * left], axis=1), format="WAV", subtype="FLOAT")
    for heard in (decode_audio(contents, RATE), decode_pcm(contents, RATE) / 32768):
        assert np.allclose(heard, left, atol=1e-4)


def test_channels_of_independent_sound_are_averaged():
    left, right = tone(1.0, seed=1), np.zeros_like(tone(1.0))
    heard = decode_audio(encoded(np.stack([left, right], axis=1), format="WAV"), RATE)
    assert np.allclose(heard, left / 65536, atol=1e-6)


def test_integers_stored_as_floats_are_refused_and_loud_mixes_are_clipped():
    loud = tone(0.5).astype(np.float64)
    contents = encoded(loud, format="WAV", subtype="FLOAT")
    for decode in (decode_audio, decode_pcm):
        with pytest.raises(AudioError, match="integers were stored as floats") as refused:
            decode(contents, RATE)
        assert refused.value.cause == Cause.BEYOND_FULL_SCALE
    with pytest.raises(AudioError, match="integers were stored as floats"):
        AudioLocation("a.wav", contents, 0.1).read()
    assert decode_pcm(encoded(loud / np.abs(loud).max() * 1.5, format="WAV", subtype="FLOAT"), RATE).max() == 32767


def test_a_part_with_samples_that_are_not_finite_says_so():
    """libsndfile writes fewer samples of FLAC then, which is an `AssertionError` of soundfile."""
    samples = np.where(np.arange(RATE) == 2_000, np.nan, 0.1)
    with pytest.raises(AudioError, match="contains samples that are not finite"):
        AudioLocation("a.wav", encoded(samples, format="WAV", subtype="FLOAT"), 0.1, 0.1).read()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_file_without_its_end_prints_no_traceback():
    """libsndfile seeks before its start; cffi prints an error of Python in its callback, which cannot be caught."""
    with pytest.raises(AudioError, match="does not decode"):
        decode_pcm(encoded(tone(0.1), format="AIFF")[:39], RATE)


@pytest.mark.parametrize("level", [-0.4, 0.0, 0.25])
def test_a_constant_is_silence(level):
    direct = np.full(RATE, level, dtype=np.float32)
    assert is_silent(direct)
    assert is_silent((direct * 32767).astype(np.int16))
    assert is_silent(direct + np.random.default_rng(0).uniform(-9e-4, 9e-4, RATE).astype(np.float32))
    assert not is_silent(direct + tone(1.0) / np.float32(32768))


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom", "MPEG-4 (AAC"),
        (bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), "Windows Media"),
        (b"#!AMR\n", "AMR"),
        (bytes.fromhex("1a45dfa3"), "Matroska"),
        (b"\xff\xf1\x60\x40", "AAC"),
        (b"RIFF\0\0\0\0AVI LIST", "AVI"),
    ],
)
def test_media_is_named_with_the_remedy_where_pyav_is_missing(monkeypatch, head, kind):
    monkeypatch.setattr(audio_source, "can_decode_media", lambda: False)
    with pytest.raises(AudioError) as refused:
        decode_pcm(head + bytes(4000), RATE)
    message = str(refused.value)
    assert message.startswith("is ")
    assert kind in message
    assert "`voxtral-dist[media]`" in message
    assert "ffmpeg -i" in message


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "gzip"),
    ],
)
def test_files_that_are_no_audio_are_named(contents, reason):
    with pytest.raises(AudioError, match=reason):
        decode_pcm(contents, RATE)

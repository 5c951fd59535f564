"""Audio that libsndfile does not decode is decoded by FFmpeg through PyAV, within the same limits."""

import io

import numpy as np
import pytest

from voxtral_dist.data.stored import audio, audio_source
from voxtral_dist.data.stored.audio import AudioError, decode_pcm
from voxtral_dist.data.stored.layout import UtteranceLayout
from voxtral_dist.data.stored.utterance import utterance_of
from voxtral_dist.shards.corpus.audio_location import AudioLocation

from corpora import tone
from media_files import encoded

av = pytest.importorskip("av", reason="the extra `media` is not installed")

RATE = 16_000
FORMATS = [
    ("mp4", "aac", 16_000, 1),
    ("mp4", "aac", 44_100, 2),
    ("adts", "aac", 16_000, 1),
    ("matroska", "aac", 48_000, 1),
    ("webm", "libopus", 48_000, 1),
    ("mov", "alac", 16_000, 1),
    ("avi", "ac3", 48_000, 1),
    ("mpegts", "aac", 48_000, 2),
    ("amr", "libopencore_amrnb", 8_000, 1),
]


@pytest.mark.parametrize(("container", "codec", "rate", "num_channels"), FORMATS)
def test_media_sounds_like_what_was_encoded(container, codec, rate, num_channels):
    heard = decode_pcm(encoded(container, codec, rate, num_channels), RATE).astype(np.float64)
    assert len(heard) == pytest.approx(RATE, abs=0.1 * RATE)
    middle = tone(1.0)[4000:12_000].astype(np.float64)
    place = int(np.correlate(heard, middle).argmax())
    assert np.corrcoef(heard[place : place + len(middle)], middle)[0, 1] > 0.9


def test_a_part_of_media_equals_that_part_of_the_whole(tmp_path):
    contents = encoded("mp4", "aac", RATE, seconds=2.0)
    (tmp_path / "memo.m4a").write_bytes(contents)
    whole = decode_pcm(contents, RATE)
    part = AudioLocation(str(tmp_path / "memo.m4a"), None, 0.75, 0.5).read()
    assert np.array_equal(decode_pcm(part, RATE), whole[12_000:20_000])
    with pytest.raises(audio_source.UnusableError, match=r"ends before it begins at 9\.00 s"):
        AudioLocation(str(tmp_path / "memo.m4a"), None, 9.0, 0.5).read()


def test_media_in_a_tar_is_an_utterance_and_a_video_beside_audio_is_none():
    members = {"m4a": b"memo", "json": b'{"text": "hello"}'}
    assert utterance_of("a", members, UtteranceLayout()).audio_suffix == "m4a"
    assert utterance_of("a", members | {"mp4": b"video", "flac": b"audio"}, UtteranceLayout()).audio_suffix == "flac"


def test_an_mp3_whose_rate_changes_inside_is_decoded_whole():
    joined = encoded("mp3", "libmp3lame", 16_000) + encoded("mp3", "libmp3lame", 24_000)
    assert len(decode_pcm(joined, RATE)) == pytest.approx(2 * RATE, abs=0.3 * RATE)


def test_a_cut_file_is_noted(tmp_path):
    notes: list[str] = []
    contents = encoded("mp4", "aac", RATE, seconds=4.0, path=tmp_path / "a.mp4")
    decode_pcm(contents, RATE, notes.append)
    assert notes == []
    decode_pcm(contents[: len(contents) * 3 // 5], RATE, notes.append)
    assert notes[0].startswith("ends after ")


def test_media_longer_than_the_limit_is_refused_while_it_is_decoded(monkeypatch):
    contents = encoded("mp4", "aac", RATE, seconds=3.0)
    monkeypatch.setattr(audio, "LONGEST_CLIP_SECONDS", 1)
    with pytest.raises(AudioError, match="longer than the limit"):
        decode_pcm(contents, RATE)


@pytest.mark.parametrize(
    "contents",
    [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n#EXT-X-ENDLIST\n",
    ],
)
def test_playlists_are_not_followed(contents):
    with pytest.raises(AudioError, match=r"does not decode \(FFmpeg"):
        decode_pcm(contents, RATE)


def test_media_without_audio_or_with_damage_is_named():
    with pytest.raises(AudioError, match=r"is MPEG-4 .*, but does not decode \(FFmpeg: Invalid data"):
        decode_pcm(b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom" + bytes(4000), RATE)
    contents = io.BytesIO()
    with av.open(contents, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((24, 16), np.uint8), format="yuv420p")))
        file.mux(stream.encode(None))
    with pytest.raises(AudioError, match="media file without audio"):
        decode_pcm(contents.getvalue(), RATE)

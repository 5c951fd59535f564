"""Kinds of files by their names and first bytes, to say what cannot be decoded."""

from __future__ import annotations

# What libsndfile decodes. Readers find the audio of an utterance by these suffixes.
AUDIO_SUFFIXES = frozenset(
    {
        *("wav", "flac", "mp3", "ogg", "oga", "opus", "aiff", "aif", "aifc", "au", "snd", "w64", "rf64", "caf"),
        *("mp2", "mpga", "sph", "nist", "voc", "bwf", "audio"),
    }
)
# What FFmpeg decodes besides: compressed audio, and containers of video.
MEDIA_SUFFIXES = frozenset(
    {
        *("m4a", "m4b", "mp4", "m4v", "mov", "3gp", "3g2", "aac", "wma", "asf", "wmv", "amr", "awb", "webm", "weba"),
        *(
            "mka",
            "mkv",
            "avi",
            "flv",
            "ts",
            "mpg",
            "mpeg",
            "spx",
            "ape",
            "wv",
            "tta",
            "ac3",
            "eac3",
            "alac",
            "ra",
            "rm",
        ),
    }
)

# Names of formats by the bytes at an offset.
_MAGIC = (
    (4, b"ftyp", "MPEG-4 (AAC, ALAC or video)"),
    (0, bytes.fromhex("3026b2758e66cf11"), "Windows Media (WMA or WMV)"),
    (0, b"#!AMR", "AMR"),
    (0, bytes.fromhex("1a45dfa3"), "Matroska or WebM"),
    (0, b"\xff\xf1", "AAC"),
    (0, b"\xff\xf9", "AAC"),
    (8, b"AVI ", "an AVI video"),
    (0, b"FLV", "a Flash video"),
    (0, b"MAC ", "Monkey's Audio"),
    (0, b"wvpk", "WavPack"),
    (0, b"TTA1", "True Audio"),
    (0, b".RMF", "RealMedia"),
    (0, b".ra\xfd", "RealAudio"),
    (0, b"\x0bw", "AC-3"),
    (28, b"Speex", "Speex"),
    (0, b"caff", "CAF with a codec"),
    (8, b"AIFC", "AIFF with a codec"),
    (8, b"WAVE", "WAV with a codec"),
    (0, b"NIST_1A", "SPHERE with a codec"),
)
# Files that are no audio at all, and what to do with them.
_STRAY = (
    (b"<!doctype html", "is a web page: its download failed"),
    (b"<html", "is a web page: its download failed"),
    (b"<?xml", "is XML: its download failed"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it"),
    (b"PK\x03\x04", "is a zip archive: unpack it"),
)


def media_name(head: bytes) -> str | None:
    """The name of a format that libsndfile does not decode, by the first 64 bytes; None if they tell nothing."""
    return next((name for offset, magic, name in _MAGIC if head[offset:].startswith(magic)), None)


def stray_reason(head: bytes) -> str | None:
    """What is wrong with a file that is no audio, by its first bytes, as a predicate; None if they tell nothing."""
    lower = head.lstrip().lower()
    return next((reason for magic, reason in _STRAY if lower.startswith(magic.lower())), None)

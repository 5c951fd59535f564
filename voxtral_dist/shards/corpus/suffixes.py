"""Suffixes of files that hold audio."""

from __future__ import annotations

from voxtral_dist.data.stored.layout import AUDIO_SUFFIXES

_OF_OTHER_FORMATS = """
m4a m4b aac ac3 wma webm weba mp2 mp4 m4v mkv mka mov avi flv 3gp 3g2 mpg mpeg sph nist amr awb ape wv tta dsf ra rm
spx gsm
"""
# Also those that libsndfile cannot decode: such files are refused by name instead of ignored.
AUDIO_FILE_SUFFIXES = frozenset(f".{name}" for name in (*AUDIO_SUFFIXES, *_OF_OTHER_FORMATS.split()))

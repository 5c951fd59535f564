"""Suffixes of files that hold audio."""

from __future__ import annotations

from voxtral_dist.data.stored.audio_kinds import AUDIO_SUFFIXES, MEDIA_SUFFIXES

# Also those that only FFmpeg decodes: without it, such files are refused by name instead of ignored.
AUDIO_FILE_SUFFIXES = frozenset(f".{name}" for name in AUDIO_SUFFIXES | MEDIA_SUFFIXES)

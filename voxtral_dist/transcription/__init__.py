"""Recordings of any length: found, cut into segments, transcribed, and written as text, JSON and subtitles."""

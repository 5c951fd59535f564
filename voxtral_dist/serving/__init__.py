"""Served models: the client of a transcription server, and the evaluation of what it answers."""

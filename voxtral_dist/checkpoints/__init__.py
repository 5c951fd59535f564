"""Checkpoints of a run: one folder each, complete or absent, readable by any engine on any number of ranks."""

"""Sharded training: one protocol, one file per library behind it."""

"""Scoring of transcripts: normalization, word errors, rates with intervals, and their files. Needs no model."""

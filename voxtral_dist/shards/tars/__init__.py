"""Tars found, read past damage, and written."""

"""Tars: found, opened, read past damage, and written."""

"""Shard sets: packed from any corpus, indexed, inspected and verified."""

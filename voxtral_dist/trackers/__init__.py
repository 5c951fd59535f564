"""Metrics, tables and reports of a run for experiment trackers, by one follower of `metrics.jsonl` for each."""

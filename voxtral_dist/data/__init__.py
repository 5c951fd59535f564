"""From tar shards to padded micro-batches: index, plan, reading, prompts, collation.

Nothing here knows of process groups: rank and world size are integers.
"""

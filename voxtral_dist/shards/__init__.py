"""Getting data in: shard sets made from any source, indexed, looked at and checked."""

"""Sharded training: the `Engine` protocol, and an implementation of it per library."""

"""Evaluation of a model on test sets: each utterance is decoded exactly once over all ranks, then scored."""

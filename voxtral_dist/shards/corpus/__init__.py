"""Corpora in any format as one stream of utterances."""

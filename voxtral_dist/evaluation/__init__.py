"""Word error rates of generated transcripts: every utterance exactly once, integers summed, divided once."""

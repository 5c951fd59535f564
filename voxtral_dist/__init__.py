"""Fine-tune Mistral's Voxtral speech models on transcription, sharded over any number of GPUs."""

__version__ = "0.1.0"

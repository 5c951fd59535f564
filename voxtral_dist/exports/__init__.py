"""Folders that other software loads: the trained model in the layouts of transformers and of Mistral, and adapters."""

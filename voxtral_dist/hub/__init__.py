"""Model cards that are written from runs, and repositories on the Hugging Face hub."""

"""The pieces of voxtral-dist for those who train with Hugging Face's `Trainer`: collator, metrics, and generation."""

"""DeepSpeed's ZeRO; the only part of the package that imports DeepSpeed."""

"""The estimate of a run without a GPU and without weights: memory of each rank, steps, FLOPs and time."""

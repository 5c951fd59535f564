"""What a run will take, without a GPU and without weights: memory of each rank, steps, FLOPs and time."""

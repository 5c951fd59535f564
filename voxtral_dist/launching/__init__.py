"""Files that start a run on many machines: manifests for Kubernetes, batch scripts for Slurm, and their like."""

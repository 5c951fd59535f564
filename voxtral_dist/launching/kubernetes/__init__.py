"""Kubernetes manifests of a run, rendered from typed models."""

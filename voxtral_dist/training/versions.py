"""Versions of the packages that a run depends on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("voxtral-dist", "torch", "transformers", "deepspeed", "peft", "torchao")


def package_versions() -> dict[str, str]:
    """Versions of this package and of those that compute and store weights, where they are installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions

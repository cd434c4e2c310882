"""Versions of installed packages, from their metadata: nothing is imported for it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from contextlib import suppress

DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "TensorRT": ("tensorrt-cu13", "tensorrt"),
    "TensorRT-RTX": ("tensorrt-rtx-cu13", "tensorrt-rtx"),
}
"""Package -> the distributions that can bring it, where they have other names."""


def installed_version(distribution: str) -> str | None:
    """Of a distribution; None if it is not installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Package -> version, of those that are installed, whichever distribution they are from."""
    return {
        package: version
        for package in packages
        for distribution in DISTRIBUTIONS.get(package, (package,))
        if (version := installed_version(distribution)) is not None
    }

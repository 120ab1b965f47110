"""Versions that a record of a run carries."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Version of Python, of this package and of what its results depend on; absent packages are left out."""
    return dict(_versions())


@cache  # the metadata is parsed from files, for some ten milliseconds
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("hywia_kernels", "torch", "triton", "transformers", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

"""Versions that a record of a run carries."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable
from functools import cache
from importlib import metadata

__all__ = ["CACHES", "cache_keyword", "versions"]

# A forward's keyword for the keys and values of earlier tokens, by transformers' versions.
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


def cache_keyword(forward: Callable) -> str:
    """The one of CACHES that a forward takes, as it was written: what decorates it may take older names, and warn."""
    known = inspect.signature(inspect.unwrap(forward)).parameters
    return next((name for name in CACHES if name in known), "past_key_values")


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

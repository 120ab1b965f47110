"""The package's exceptions. Every message names the argument, what was expected, what came, and the way out."""

from __future__ import annotations

__all__ = ["BackendError", "HywiaError", "UsageError"]


class HywiaError(RuntimeError):
    """The work could not be done (exit code 1): bad data, a model that cannot be handled, a full disk."""


class UsageError(HywiaError, ValueError):
    """The request itself is wrong (exit code 2): an argument outside what the function or command accepts."""


class BackendError(UsageError):
    """A backend was asked for by name and is unknown, off on this machine, or cannot take these tensors."""

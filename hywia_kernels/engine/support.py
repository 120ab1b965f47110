"""Which models the fused passes serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import arch
from ..types import Group

__all__ = ["unsupported"]


def unsupported(model: Any, found: Sequence[Group]) -> str | None:
    """Why the fused passes cannot measure this model; None: they can."""
    for matrix in arch.matrices(model, found):
        if matrix.index is not None:
            return f"{matrix.module} holds experts, each of which sees other tokens"
    return None

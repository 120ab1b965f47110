"""Which models the fused passes serve."""

from __future__ import annotations

from collections.abc import Sequence

from ..types import Group

__all__ = ["unsupported"]


def unsupported(found: Sequence[Group]) -> str | None:
    """Why the fused passes cannot measure a model of these groups; None: they can."""
    for group in found:
        if group.together:
            return f"{group.members[0].module} holds experts, each of which sees other tokens"
    return None

"""What the stages of pruning hand each other: groups of units, statistics, scores and plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .groups import Group, Member, check_together

if TYPE_CHECKING:
    from .results import Plan, Scores, Statistics

__all__ = ["Group", "Member", "Plan", "Scores", "Statistics", "check_together"]


def __getattr__(name: str) -> Any:
    """Import the types that hold tensors when they are asked for: servers' rules and recipes need the groups alone."""
    if name in ("Plan", "Scores", "Statistics"):
        from . import results

        return getattr(results, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

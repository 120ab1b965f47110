"""What the stages of pruning hand each other: groups of units, statistics, scores and plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .groups import Group, Member, channels_of_gone_experts, check_together, experts_of, removed_parameters

if TYPE_CHECKING:
    from .layers import Depth, LayerScores
    from .results import Plan, Scores, Statistics

__all__ = [
    "Depth",
    "Group",
    "LayerScores",
    "Member",
    "Plan",
    "Scores",
    "Statistics",
    "channels_of_gone_experts",
    "check_together",
    "experts_of",
    "removed_parameters",
]


def __getattr__(name: str) -> Any:
    """Import the types that hold tensors when they are asked for: servers' rules and recipes need the groups alone."""
    if name in ("Plan", "Scores", "Statistics"):
        from . import results

        return getattr(results, name)
    if name in ("Depth", "LayerScores"):
        from . import layers

        return getattr(layers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

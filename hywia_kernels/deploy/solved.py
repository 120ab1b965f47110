"""Widths of what a run solves and ranks."""

from __future__ import annotations

from typing import Any

from ..types import Group

__all__ = ["head_widths", "inputs_of", "solved"]


def head_widths(groups: Any) -> list[int]:
    return [inputs_of(g) for g in groups if g.kind == "attention"]


def inputs_of(group: Group) -> int:
    """Width of what enters the matrix through which the units send their output on."""
    return group.units * group.members[-1].group_size


def solved(groups: Any) -> list[Group]:
    """The groups whose output matrices are solved again, but for stacked experts': theirs see few tokens each, and
    take one pass a layer together."""
    return [g for g in groups if g.members[-1].index is None and g.kind != "experts"]

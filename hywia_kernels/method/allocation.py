"""How many channels each layer keeps when layers may differ: one ranking over all of them, in whole alignment steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import UsageError
from ..types import Group, Scores

__all__ = ["allocate"]


@dataclass(frozen=True)
class _Step:
    """Taking one layer's channels from one allowed width down to the next."""

    price: float  # estimated loss per parameter
    item: int
    order: int  # the item's how many-th step
    width: int
    parameters: int


def allocate(
    scores: Scores, counts: Mapping[str, int], groups: Sequence[Group], widths: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Counts that remove as many parameters as `counts` do from `groups`, where the estimated loss is least.

    Within a group units go from the lowest score up; what a step costs is the loss estimate (`Scores.loss`) of the
    units it takes, per parameter, and never less than the step before it in that layer. First and last layers have no
    rule of their own: what they are worth is in the estimates. Groups of one stacked parameter stay equally wide.

    Args:
        counts: units that each group would keep under equal shares.
        groups: those that may differ.
        widths: allowed counts of each group, ascending, at least one.

    Raises:
        UsageError: scores without an estimate of the loss.
    """
    if not scores.loss:
        raise UsageError(
            f"layout: adaptive needs scores that estimate the loss; criterion {scores.record.get('criterion')!r} does "
            "not, so its layers can only be cut alike (uniform)"
        )
    items: dict[str, list[Group]] = {}
    for group in groups:
        items.setdefault(group.tied_width or group.name, []).append(group)
    steps = [s for i, members in enumerate(items.values()) for s in _steps(scores, i, members, widths)]
    steps.sort(key=lambda s: (s.price, s.item, s.order))
    budget = sum((g.units - counts[g.name]) * g.unit_parameters for g in groups)
    # Where the present width is none of the allowed, the first step down is no choice.
    result = {g.name: widths[g.name][-1] for g in groups}
    taken = [0] * len(items)
    removed = sum((g.units - result[g.name]) * g.unit_parameters for g in groups)
    for step in steps:
        # A step that would leave the target further than before is not taken, and closes its layer.
        if step.order != taken[step.item] or removed + step.parameters - budget > budget - removed:
            continue
        taken[step.item] += 1
        removed += step.parameters
        for group in list(items.values())[step.item]:
            result[group.name] = step.width
    return result


def _steps(scores: Scores, item: int, members: Sequence[Group], widths: Mapping[str, Sequence[int]]) -> list[_Step]:
    allowed = list(widths[members[0].name])[::-1]  # widest first
    parameters = sum(g.unit_parameters for g in members)
    costs = torch.zeros(members[0].units + 1, dtype=torch.float64)  # of removing the lowest k units
    for group in members:
        lowest = torch.sort(scores.values[group.name].flip(0), stable=True).indices  # of equals the higher index goes
        loss = scores.loss[group.name].double().flip(0)[lowest]
        costs[1:] += loss.cumsum(0)
    steps, price = [], 0.0
    for order, (wide, narrow) in enumerate(itertools.pairwise(allowed)):
        size = (wide - narrow) * parameters
        units = members[0].units
        price = max(price, float(costs[units - narrow] - costs[units - wide]) / size)
        steps.append(_Step(price, item, order, narrow, size))
    return steps

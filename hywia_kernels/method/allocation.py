"""How many channels each layer keeps when layers may differ: all layers' steps between widths ranked together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import UsageError
from ..types import Group, Scores

__all__ = ["allocate"]


@dataclass(frozen=True)
class _Step:
    """A cut of one bundle of groups, those that must stay equally wide, from one allowed width down to the next."""

    price: float  # estimated loss per parameter
    bundle: int  # position of the bundle
    order: int  # how many steps of the bundle come before this one
    width: int  # units that each of its groups keeps after the step
    parameters: int  # parameters that the step removes


def allocate(
    scores: Scores,
    counts: Mapping[str, int],
    groups: Sequence[Group],
    widths: Mapping[str, Sequence[int]],
    spread: float = 1.0,
) -> dict[str, int]:
    """Units that each group keeps when as many parameters go as under `counts`, from where the estimated loss is least.

    Within a group units go from the lowest score up. A step costs the loss estimate (`Scores.loss`) of the units that
    it removes, per parameter, and never less than the step before it in that layer. First and last layers have no rule
    of their own: what they are worth is in the estimates. Groups of one stacked parameter stay equally wide.

    The estimates are those of single units in the whole model, so they may set layers further apart than a deep cut
    bears. `spread` draws them together: a step to a share `r` of its layer's units costs `p^spread · m(r)^(1 − spread)`
    with `p` its own price and `m(r)` the mean over all layers of what a step to that share costs.

    Args:
        scores: with an estimate of the loss.
        counts: group name -> units that it would keep under equal shares.
        groups: the groups whose widths may differ.
        widths: group name -> allowed counts of units, ascending, at least one.
        spread: how far the estimates decide, from 0 (not at all: `counts`) to 1 (alone).

    Returns:
        Group name -> units to keep, one of the group's allowed counts.

    Raises:
        UsageError: scores without an estimate of the loss.
    """
    if not scores.loss:
        raise UsageError(
            f"layout: adaptive needs scores that estimate the loss; criterion {scores.record.get('criterion')!r} does "
            "not, so its layers can only be cut alike (uniform)"
        )
    by_width: dict[str, list[Group]] = {}
    for group in groups:
        by_width.setdefault(group.tied_width or group.name, []).append(group)
    if spread == 0.0:
        return {g.name: counts[g.name] for g in groups}
    bundles = list(by_width.values())
    by_bundle = [_steps(scores, i, bundle, widths) for i, bundle in enumerate(bundles)]
    if spread < 1.0:
        by_bundle = _drawn_together(by_bundle, [bundle[0].units for bundle in bundles], spread)
    steps = list(itertools.chain.from_iterable(by_bundle))
    steps.sort(key=lambda s: (s.price, s.bundle, s.order))
    budget = sum((g.units - counts[g.name]) * g.unit_parameters for g in groups)
    # A group whose present width is not allowed begins at its widest allowed one.
    result = {g.name: widths[g.name][-1] for g in groups}
    taken = [0] * len(bundles)
    removed = sum((g.units - result[g.name]) * g.unit_parameters for g in groups)
    for step in steps:
        # A step that would lead further from the budget is skipped, and with it the later steps of its bundle.
        if step.order != taken[step.bundle] or removed + step.parameters - budget > budget - removed:
            continue
        taken[step.bundle] += 1
        removed += step.parameters
        for group in bundles[step.bundle]:
            result[group.name] = step.width
    return result


def _steps(scores: Scores, index: int, bundle: Sequence[Group], widths: Mapping[str, Sequence[int]]) -> list[_Step]:
    """All steps of the bundle at position `index`, from its widest allowed width to its narrowest."""
    allowed = list(widths[bundle[0].name])[::-1]  # widest first
    parameters = sum(g.unit_parameters for g in bundle)
    costs = torch.zeros(bundle[0].units + 1, dtype=torch.float64)  # of removing the lowest k units
    for group in bundle:
        lowest = torch.sort(scores.values[group.name].flip(0), stable=True).indices  # of equals the higher index goes
        loss = scores.loss[group.name].double().flip(0)[lowest]
        costs[1:] += loss.cumsum(0)
    steps, price = [], 0.0
    for order, (wide, narrow) in enumerate(itertools.pairwise(allowed)):
        size = (wide - narrow) * parameters
        units = bundle[0].units
        price = max(price, float(costs[units - narrow] - costs[units - wide]) / size)
        steps.append(_Step(price, index, order, narrow, size))
    return steps


def _drawn_together(by_bundle: Sequence[Sequence[_Step]], units: Sequence[int], spread: float) -> list[list[_Step]]:
    """The bundles' steps with prices between their own and the mean of all bundles' at the same share of the units."""
    means: dict[float, float] = {}

    def mean(share: float) -> float:
        if share not in means:
            # Of each bundle the first step that leads as far down, or its last one.
            prices = [
                next((s.price for s in steps if s.width <= share * count), steps[-1].price)
                for steps, count in zip(by_bundle, units, strict=True)
                if steps
            ]
            means[share] = sum(prices) / len(prices)
        return means[share]

    return [
        [replace(s, price=s.price**spread * mean(s.width / count) ** (1.0 - spread)) for s in steps]
        for steps, count in zip(by_bundle, units, strict=True)
    ]

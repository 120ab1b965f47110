"""The widths and depths by which a model loses a share of all its parameters, alike in every layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import HywiaError, UsageError
from ..types import Depth, Group, Scores, experts_of
from .depth import depths_of, loss_by_count, staying_groups

__all__ = ["Candidate", "Limits", "candidates", "some_width", "too_wide", "uniform", "widths_of"]

Limits = Callable[[Group, list[int]], list[int]]  # of a group's widths, ascending, those that may be chosen


@dataclass(frozen=True)
class Candidate:
    """Widths by kind and a depth that one request may end at.

    Attributes:
        removed: parameters that go. widths: kind -> units that every layer that stays keeps. depth: as in `Plan`.
    """

    removed: int
    widths: dict[str, int]
    depth: Depth | None

    @property
    def split(self) -> dict[str, int]:
        """As `splits` gives it."""
        return self.widths if self.depth is None else {**self.widths, "layers": len(self.depth.keep)}

    @property
    def gone(self) -> int:
        """How many layers go."""
        return 0 if self.depth is None else len(self.depth.gone)

    def unevenness(self, present: dict[str, int]) -> float:
        """How far the shares that kinds lose lie apart; `present`: kind -> units before."""
        shares = [1.0 - width / present[kind] for kind, width in self.widths.items()]
        if "layers" in present:
            shares.append(self.gone / present["layers"])
        return max(shares) - min(shares)


def uniform(
    scores: Scores,
    ratio: float,
    kinds: tuple[str, ...],
    align: int,
    limits: Limits | None,
    layers_gone: int | None,
    split: Mapping[str, int] | None,
) -> tuple[dict[str, int], Depth | None]:
    """`(units that each group keeps, which layers stay)`."""
    found = candidates(scores, ratio, kinds, align, limits, layers_gone)
    best = found[0] if split is None else next((c for c in found if c.split == dict(split)), None)
    if best is None:
        raise UsageError(f"split: expected one of {[c.split for c in found]}, got {dict(split or {})}")
    stay = {g.name for g in staying_groups(scores.groups, best.depth)}
    return {g.name: best.widths.get(g.kind, g.units) if g.name in stay else 0 for g in scores.groups}, best.depth


def candidates(
    scores: Scores,
    ratio: float,
    kinds: tuple[str, ...],
    align: int,
    limits: Limits | None,
    layers_gone: int | None = None,
) -> list[Candidate]:
    """What a ratio may end at, one for each depth and count of heads, and of experts where their channels may go too;
    the first is what is chosen without a search."""
    depths = depths_of(scores, layers_gone) if "layers" in kinds else [None]
    in_layers = tuple(k for k in kinds if k != "layers")
    options = {kind: _uniform_widths(scores, kind, align, limits) for kind in in_layers}
    present = {kind: next(g.units for g in scores.groups if g.kind == kind) for kind in in_layers}
    target = ratio * scores.parameters

    step = _step(scores, in_layers, align, present)
    near: list[Candidate] = []
    least, most = scores.parameters, 0
    for depth in depths:
        staying = staying_groups(scores.groups, depth)
        cost = {kind: sum(g.unit_parameters for g in staying if g.kind == kind) for kind in in_layers}
        both = 0  # parameters of a channel of an expert in each layer, which go once when the expert does
        if {"mlp", "experts"} <= set(in_layers):
            both = sum(channels[0].unit_parameters for _, channels in experts_of(staying) if channels)
        whole = 0 if depth is None else depth.removed
        for widths in itertools.product(*options.values()):
            choice = dict(zip(options, widths, strict=True))
            removed = whole + sum((present[k] - v) * cost[k] for k, v in choice.items())
            if both:
                removed -= (present["mlp"] - choice["mlp"]) * (present["experts"] - choice["experts"]) * both
            if removed <= 0:
                continue
            least, most = min(least, removed), max(most, removed)
            if abs(removed - target) <= step:
                near.append(Candidate(removed, choice, depth))
    if not near:
        reach = (least / scores.parameters, most / scores.parameters)
        span = f"[{reach[0]:.4f}, {reach[1]:.4f}]; the largest is {reach[1]:.4f}" if most else "nothing"
        aligned = f" with align={align}" if in_layers else ""
        raise UsageError(
            f"ratio: {ratio} cannot be reached to within one step of {step / scores.parameters:.4f}; "
            f"{' and '.join(kinds)}{aligned} reach {span}{too_wide(scores.groups, align) if in_layers else ''}"
        )
    if "layers" in kinds and scores.layers is not None:
        present["layers"] = len(scores.layers.parameters)
    return _by_loss(scores, near, target, present, step)


def _step(scores: Scores, kinds: tuple[str, ...], align: int, present: Mapping[str, int]) -> int:
    """Parameters of one step of a request's size: one alignment step of all layers' channels when they may go; else of
    experts or heads; else one layer."""
    if not kinds:
        return max(scores.layers.parameters) if scores.layers is not None else 0
    fine = next(kind for kind in ("mlp", "experts", "attention") if kind in kinds)
    cost = sum(g.unit_parameters for g in scores.groups if g.kind == fine)
    return (min(align, present[fine]) if fine == "mlp" else 1) * cost


def _uniform_widths(scores: Scores, kind: str, align: int, limits: Limits | None) -> list[int]:
    members = [g for g in scores.groups if g.kind == kind]
    if len({g.units for g in members}) != 1:
        raise HywiaError(
            f"ratio: the layers' {kind} widths differ already, so one width for all cannot be cut; use group_ratio"
        )
    stock = members[0].stock_counts
    return [w for w in widths_of(members[0], align, limits) if kind != "attention" or not stock or w in stock]


def _by_loss(
    scores: Scores, near: Sequence[Candidate], target: float, present: dict[str, int], step: float
) -> list[Candidate]:
    """The candidates that come nearest to the target, one for each depth, count of heads and, beside channels, of
    experts, in ascending order of the loss; of depths alone the nearest."""
    if set(present) == {"layers"}:
        return [min(near, key=lambda c: (abs(c.removed - target), c.removed))]
    nearest: dict[tuple[int, int | None, int | None], Candidate] = {}
    for one in near:
        key = (one.gone, one.widths.get("attention"), one.widths.get("experts") if "mlp" in one.widths else None)
        best = nearest.get(key)
        if best is None or abs(one.removed - target) < abs(best.removed - target):
            nearest[key] = one
    # One on the far side of half a step is kept only when nothing nearer exists.
    within = [c for c in nearest.values() if abs(c.removed - target) <= step / 2] or list(nearest.values())
    by_count = None if scores.layers is None else loss_by_count(scores.layers)
    if not scores.loss or ("layers" in present and by_count is None):
        return sorted(within, key=lambda c: (c.unevenness(present), abs(c.removed - target)))
    lost = _loss_by_width(scores, within[0].widths)
    stacks = _loss_by_experts(scores, lost) if {"mlp", "experts"} <= set(within[0].widths) else {}

    def loss(one: Candidate) -> float:
        staying = [g for g in staying_groups(scores.groups, one.depth) if g.name in lost]
        units = sum(lost[g.name][one.widths[g.kind]] for g in staying)
        units += sum(
            float(stacks[g.name][one.widths["experts"], one.widths["mlp"]]) for g in staying if g.name in stacks
        )
        return units + (by_count[one.gone] if by_count is not None else 0.0)

    return sorted(within, key=lambda c: (loss(c), abs(c.removed - target)))


def _loss_by_width(scores: Scores, kinds: Collection[str]) -> dict[str, list[float]]:
    """Group -> list whose entry `n` is the estimated loss of all its units that go when it keeps `n`."""
    lost: dict[str, list[float]] = {}
    for group in scores.groups:
        if group.kind in kinds:
            order = torch.sort(scores.values[group.name], descending=True, stable=True).indices
            loss = scores.loss[group.name].double()[order]
            lost[group.name] = (loss.sum() - torch.cat([loss.new_zeros(1), loss.cumsum(0)])).tolist()
    return lost


def _loss_by_experts(scores: Scores, lost: dict[str, list[float]]) -> dict[str, torch.Tensor]:
    """Group of whole experts -> table whose entry `[n, w]` is the estimated loss of all channels that go of the `n`
    experts that stay when each keeps `w`; the channels' groups leave `lost`, where those of all experts were."""
    tables: dict[str, torch.Tensor] = {}
    for whole, channels in experts_of(scores.groups):
        if not channels:
            continue
        order = torch.sort(scores.values[whole.name], descending=True, stable=True).indices
        each = torch.tensor([lost.pop(group.name) for group in channels], dtype=torch.float64)[order]
        tables[whole.name] = torch.cat([each.new_zeros(1, each.shape[1]), each.cumsum(0)])
    return tables


def widths_of(group: Group, align: int, limits: Limits | None) -> list[int]:
    """Counts a group may be cut to, ascending, the present one included."""
    counts = list(range(group.min_units, group.units + 1))
    if group.kind == "mlp":
        counts = [*range(align, group.units, align), group.units]
    return counts if limits is None else limits(group, counts)


def some_width(groups: Sequence[Group], widths: Mapping[str, Sequence[int]]) -> None:
    for group in groups:
        if not widths[group.name]:
            raise UsageError(f"limits: expected some width that {group.name} of {group.units} may have, got none")


def too_wide(groups: Iterable[Group], align: int) -> str:
    """What to add to a message where the alignment leaves no width to cut to."""
    narrow = max((g.units for g in groups if g.kind == "mlp"), default=align + 1)
    return f" (the widest MLP has {narrow} channels, so none can be cut)" if narrow <= align else ""

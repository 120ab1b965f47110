"""From scores to a plan: which units stay, under which protocol, and what that costs."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..deploy import device_profiles
from ..errors import HywiaError, UsageError
from ..settings import DEFAULT_KINDS, KINDS, LAYOUTS
from ..types import Depth, Group, Plan, Scores
from .allocation import allocate
from .depth import check_layers_gone, chosen, depths_of, loss_by_count, shared_out, staying_groups

__all__ = ["check_kinds", "may_go", "plan", "ranked_again", "requested_kinds", "top_units"]

Limits = Callable[[Group, list[int]], list[int]]  # of a group's widths, ascending, those that may be chosen


def plan(
    scores: Scores,
    *,
    ratio: float | None = None,
    group_ratio: float | Mapping[str, float] | None = None,
    layers: tuple[int, int] | None = None,
    units: Sequence[str] = DEFAULT_KINDS,
    align: int = 64,
    layout: str = "uniform",
    limits: Limits | None = None,
    layers_gone: int | None = None,
) -> Plan:
    """Choose the units to keep.

    Two protocols:

    * `ratio`: the share of all parameters to remove. Every layer gets the same width per kind, so that a stock config
      describes the result; widths are multiples of `align`, heads are whole. Of the width pairs that meet the ratio
      to within one alignment step, the one whose removed units add least to the loss by the scores' estimate is
      taken; scores without an estimate (magnitude, random) remove the same share of both kinds, as nearly as whole
      heads allow. Where whole layers may go too, each number of them is a further dimension of that choice; where they
      alone may go, as many go as come nearest to the ratio.
    * `group_ratio` with `layers=(first, end)`: the papers' protocol, that share of every listed layer's units, or of
      the listed layers.

    In both, units are ranked within their group, and of equals the lower index stays. With `layout="adaptive"` the
    layers share the same number of channels out among them by what their removal is estimated to add to the loss
    (see `allocation.allocate`); heads and experts keep the same share in every layer.

    Args:
        scores: of the model to prune.
        ratio: in (0, 1).
        group_ratio: in (0, 1), instead of `ratio`; or kind -> such a number, for the kinds that may go.
        layers: half-open range of layers for `group_ratio`; None: all.
        units: which kinds may go: "mlp", "attention" or both; or, in models that have them, whole "experts", with
            or without "attention"; and whole "layers", alone or with others, where the scores have them
            (`rank_layers`).
        align: widths of channels are multiples of it, or untouched; None: what suits the device at hand
            (`device_profiles.at_hand`).
        layout: "uniform" or "adaptive".
        limits: gives the widths of a group that may be chosen (`serving_rules.allowed`, or those that suit a device);
            None: all.
        layers_gone: with `ratio` and "layers" among the units, how many layers go; None: it is chosen.

    Raises:
        UsageError: arguments outside the above, or a ratio that these units cannot reach.
    """
    scores.check()
    kinds = _kinds(requested_kinds(group_ratio=group_ratio, units=units), scores.groups)
    if "layers" in kinds and scores.layers is None:
        raise UsageError("scores: expected some of whole layers, got none; add them (rank_layers) or leave layers out")
    if layout not in LAYOUTS:
        raise UsageError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if align is None:
        align = device_profiles.at_hand().align
    if align < 1:
        raise UsageError(f"align: expected at least 1, got {align}")
    if (ratio is None) == (group_ratio is None):
        raise UsageError("ratio: expected exactly one of ratio and group_ratio")
    if ratio is not None:
        _in_unit_interval("ratio", ratio)
        if layers is not None:
            raise UsageError("layers: goes with group_ratio; ratio prunes every layer to the same width")
        check_layers_gone(scores, kinds, layers_gone)
        counts, depth = _uniform(scores, ratio, kinds, align, limits, layers_gone)
        request: dict[str, Any] = {"protocol": "ratio", "ratio": ratio}
    else:
        assert group_ratio is not None
        if layers_gone is not None:
            raise UsageError("layers_gone: goes with ratio; group_ratio says the share of layers itself")
        shares = dict(group_ratio) if isinstance(group_ratio, Mapping) else dict.fromkeys(kinds, group_ratio)
        for share in shares.values():
            _in_unit_interval("group_ratio", share)
        counts, depth = _per_group(scores, shares, layers, align, limits, isinstance(group_ratio, Mapping))
        given = dict(group_ratio) if isinstance(group_ratio, Mapping) else group_ratio
        request = {"protocol": "group_ratio", "group_ratio": given, "layers": layers and list(layers)}
    if layout == "adaptive":
        first, end = layers or (0, 1 + max(g.layer for g in scores.groups))
        staying = staying_groups(scores.groups, depth)
        free = [g for g in staying if g.kind == "mlp" and "mlp" in kinds and first <= g.layer < end]
        widths = {g.name: _widths(g, align, limits) for g in free}
        _some_width(free, widths)
        counts |= allocate(scores, counts, free, widths)
    request |= {"units": list(kinds), "align": align, "layout": layout}
    if depth is not None and scores.layers is not None:
        request["layers_by"] = scores.layers.record.get("by")
    keep = {g.name: top_units(scores.values[g.name], counts[g.name]) for g in scores.groups}
    removed = sum((g.units - counts[g.name]) * g.unit_parameters for g in staying_groups(scores.groups, depth))
    removed += 0 if depth is None else depth.removed
    return Plan(
        groups=scores.groups,
        keep=keep,
        parameters_before=scores.parameters,
        parameters_after=scores.parameters - removed,
        layout=_layout(staying_groups(scores.groups, depth), counts),
        fingerprint=scores.fingerprint,
        record={**request, "scores": dict(scores.record)},
        depth=depth,
    )


def may_go(
    groups: Sequence[Group],
    *,
    group_ratio: float | Mapping[str, float] | None = None,
    layers: tuple[int, int] | None = None,
    units: Sequence[str] = DEFAULT_KINDS,
    **_: Any,
) -> Callable[[Group], bool]:
    """Whether a request, in the arguments of `plan`, may cut a group: a test of the group's kind and layer."""
    kinds = _kinds(requested_kinds(group_ratio=group_ratio, units=units), groups)
    first, end = _span(groups, layers)
    return lambda group: group.kind in kinds and first <= group.layer < end


def requested_kinds(
    *, group_ratio: float | Mapping[str, float] | None = None, units: Sequence[str] = DEFAULT_KINDS, **_: Any
) -> tuple[str, ...]:
    """The kinds of units that a request, in the arguments of `plan`, names."""
    return tuple(group_ratio) if isinstance(group_ratio, Mapping) else tuple(units)


def top_units(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values, ascending, int64; of equals the lower index stays."""
    order = torch.sort(values, descending=True, stable=True).indices
    return order[:count].sort().values


def ranked_again(plan: Plan, scores: Scores) -> Plan:
    """The plan with as many units in each group, chosen by other scores of the same groups."""
    keep = {name: top_units(scores.values[name], kept.numel()) for name, kept in plan.keep.items()}
    return dataclasses.replace(plan, keep=keep, record={**plan.record, "scores": dict(scores.record)})


def check_kinds(units: Sequence[str]) -> None:
    """Raise UsageError where `units` is empty or names an unknown kind of units."""
    unknown = [u for u in units if u not in KINDS]
    if unknown or not units:
        near = [difflib.get_close_matches(str(u), KINDS, 1, 0.5) for u in unknown]
        meant = ", ".join(match[0] for match in near if match)
        raise UsageError(
            f"units: expected some of {', '.join(KINDS)}, got {', '.join(map(str, units)) or 'none'}"
            + (f"; did you mean {meant}?" if meant else "")
        )


def _kinds(units: Sequence[str], groups: Sequence[Group]) -> tuple[str, ...]:
    check_kinds(units)
    chosen = tuple(k for k in KINDS if k in units)
    missing = set(chosen) - {g.kind for g in groups} - {"layers"}
    if missing:
        has = ", ".join(k for k in KINDS if k == "layers" or any(g.kind == k for g in groups))
        raise UsageError(f"units: the model has no {', '.join(sorted(missing))} to cut, only {has}; leave it out")
    empty = next((g.name for g in groups if g.kind in chosen and not g.unit_parameters), None)
    if empty is not None:
        raise UsageError(f"scores: expected units that hold parameters, got {empty}, whose units hold none")
    if {"mlp", "experts"} <= set(chosen):
        raise UsageError(
            "units: expected mlp or experts, got both, which hold each other; cut one, score again, then cut the other"
        )
    return chosen


def _in_unit_interval(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise UsageError(f"{name}: expected a number between 0 and 1, both excluded, got {value}")


def _layout(groups: Iterable[Group], counts: dict[str, int]) -> str:
    by_kind: dict[tuple[str, str], set[int]] = {}
    for group in groups:  # dense MLPs and experts of one model have widths of their own
        by_kind.setdefault((group.kind, group.width_field), set()).add(counts[group.name])
    return "uniform" if all(len(widths) == 1 for widths in by_kind.values()) else "adaptive"


def _widths(group: Group, align: int, limits: Limits | None) -> list[int]:
    """Counts a group may be cut to, ascending, the present one included."""
    counts = list(range(group.min_units, group.units + 1))
    if group.kind == "mlp":
        counts = [*range(align, group.units, align), group.units]
    return counts if limits is None else limits(group, counts)


def _per_group(
    scores: Scores,
    shares: Mapping[str, float],
    layers: tuple[int, int] | None,
    align: int,
    limits: Limits | None,
    named: bool,
) -> tuple[dict[str, int], Depth | None]:
    """`(units that each group keeps, which layers stay)`."""
    first, end = _span(scores.groups, layers)
    depth = None
    if "layers" in shares and scores.layers is not None:
        depth = chosen(scores.layers, shared_out(scores.layers, shares["layers"], (first, end)), (first, end))
    staying = staying_groups(scores.groups, depth)
    counts = dict.fromkeys((g.name for g in scores.groups), 0) | {g.name: g.units for g in staying}
    cut = [g for g in staying if g.kind in shares and first <= g.layer < end]
    widths = {g.name: _widths(g, align, limits) for g in cut}
    _some_width(cut, widths)
    for group in cut:
        target = group.units * (1.0 - shares[group.kind])
        # Nearest allowed width; of two equally near the wider, which removes less.
        counts[group.name] = min(widths[group.name], key=lambda w: (abs(w - target), -w))
    whole = [k for k in shares if k != "layers" and all(counts[g.name] == g.units for g in cut if g.kind == k)]
    whole += ["layers"] if "layers" in shares and depth is None else []
    # One share for all kinds may leave one of them whole; a share of its own must do something.
    if whole and (named or len(whole) == len(shares)):
        given = ", ".join(str(s) for s in dict.fromkeys(shares[k] for k in whole))
        raise UsageError(
            f"group_ratio: {given} rounds to nothing with align={align} and whole heads"
            + (f" for {' and '.join(whole)}" if named else "")
            + f"; ask for more, or a smaller align{_too_wide(cut, align)}"
        )
    return counts, depth


def _span(groups: Sequence[Group], layers: tuple[int, int] | None) -> tuple[int, int]:
    """`layers`, or the range of all layers for None; raises UsageError where it is out of range."""
    depth = 1 + max(g.layer for g in groups)
    first, end = layers if layers is not None else (0, depth)
    if not 0 <= first < end <= depth:
        raise UsageError(f"layers: expected FIRST:END with 0 <= FIRST < END <= {depth}, got {first}:{end}")
    return first, end


def _some_width(groups: Sequence[Group], widths: Mapping[str, Sequence[int]]) -> None:
    for group in groups:
        if not widths[group.name]:
            raise UsageError(f"limits: expected some width that {group.name} of {group.units} may have, got none")


def _too_wide(groups: Iterable[Group], align: int) -> str:
    """What to add to a message where the alignment leaves no width to cut to."""
    narrow = max((g.units for g in groups if g.kind == "mlp"), default=align + 1)
    return f" (the widest MLP has {narrow} channels, so none can be cut)" if narrow <= align else ""


@dataclass(frozen=True)
class _Candidate:
    """Widths by kind and a depth that one request may end at.

    Attributes:
        removed: parameters that go. widths: kind -> units that every layer that stays keeps. depth: as in `Plan`.
    """

    removed: int
    widths: dict[str, int]
    depth: Depth | None

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


def _uniform(
    scores: Scores,
    ratio: float,
    kinds: tuple[str, ...],
    align: int,
    limits: Limits | None,
    layers_gone: int | None,
) -> tuple[dict[str, int], Depth | None]:
    """`(units that each group keeps, which layers stay)`."""
    depths = depths_of(scores, layers_gone) if "layers" in kinds else [None]
    in_layers = tuple(k for k in kinds if k != "layers")
    options = {kind: _uniform_widths(scores, kind, align, limits) for kind in in_layers}
    present = {kind: next(g.units for g in scores.groups if g.kind == kind) for kind in in_layers}
    target = ratio * scores.parameters

    candidates: list[_Candidate] = []
    for depth in depths:
        staying = staying_groups(scores.groups, depth)
        cost = {kind: sum(g.unit_parameters for g in staying if g.kind == kind) for kind in in_layers}
        whole = 0 if depth is None else depth.removed
        for widths in itertools.product(*options.values()):
            choice = dict(zip(options, widths, strict=True))
            removed = whole + sum((present[k] - v) * cost[k] for k, v in choice.items())
            if removed > 0:
                candidates.append(_Candidate(removed, choice, depth))
    step = _step(scores, in_layers, align, present)
    near = [c for c in candidates if abs(c.removed - target) <= step]
    if not near:
        reach = sorted(c.removed / scores.parameters for c in candidates)
        span = f"[{reach[0]:.4f}, {reach[-1]:.4f}]; the largest is {reach[-1]:.4f}" if reach else "nothing"
        aligned = f" with align={align}" if in_layers else ""
        raise UsageError(
            f"ratio: {ratio} cannot be reached to within one step of {step / scores.parameters:.4f}; "
            f"{' and '.join(kinds)}{aligned} reach {span}{_too_wide(scores.groups, align) if in_layers else ''}"
        )
    if "layers" in kinds and scores.layers is not None:
        present["layers"] = len(scores.layers.parameters)
    best = _least_loss(scores, near, target, present, step)
    stay = {g.name for g in staying_groups(scores.groups, best.depth)}
    return {g.name: best.widths.get(g.kind, g.units) if g.name in stay else 0 for g in scores.groups}, best.depth


def _step(scores: Scores, kinds: tuple[str, ...], align: int, present: Mapping[str, int]) -> int:
    """Parameters of one step of a request's size: one alignment step of all layers' channels when they may go; else of
    experts or heads; else one layer."""
    if not kinds:
        return max(scores.layers.parameters) if scores.layers is not None else 0
    fine = kinds[0] if "experts" not in kinds else "experts"
    cost = sum(g.unit_parameters for g in scores.groups if g.kind == fine)
    return (min(align, present[fine]) if fine == "mlp" else 1) * cost


def _uniform_widths(scores: Scores, kind: str, align: int, limits: Limits | None) -> list[int]:
    members = [g for g in scores.groups if g.kind == kind]
    if len({g.units for g in members}) != 1:
        raise HywiaError(
            f"ratio: the layers' {kind} widths differ already, so one width for all cannot be cut; use group_ratio"
        )
    stock = members[0].stock_counts
    return [w for w in _widths(members[0], align, limits) if kind != "attention" or not stock or w in stock]


def _least_loss(
    scores: Scores, near: Sequence[_Candidate], target: float, present: dict[str, int], step: float
) -> _Candidate:
    """Of the candidates that come nearest to the target, one for each depth and count of heads, the one of the least
    loss; of depths alone the nearest."""
    if set(present) == {"layers"}:
        return min(near, key=lambda c: (abs(c.removed - target), c.removed))
    nearest: dict[tuple[int, int | None], _Candidate] = {}
    for one in near:
        key = (one.gone, one.widths.get("attention"))
        best = nearest.get(key)
        if best is None or abs(one.removed - target) < abs(best.removed - target):
            nearest[key] = one
    # One on the far side of half a step is kept only when nothing nearer exists.
    within = [c for c in nearest.values() if abs(c.removed - target) <= step / 2] or list(nearest.values())
    by_count = None if scores.layers is None else loss_by_count(scores.layers)
    if scores.loss and ("layers" not in present or by_count is not None):
        lost = _loss_by_width(scores, within[0].widths)

        def loss(one: _Candidate) -> float:
            staying = [g for g in staying_groups(scores.groups, one.depth) if g.name in lost]
            units = sum(lost[g.name][one.widths[g.kind]] for g in staying)
            return units + (by_count[one.gone] if by_count is not None else 0.0)

        return min(within, key=lambda c: (loss(c), abs(c.removed - target)))
    return min(within, key=lambda c: (c.unevenness(present), abs(c.removed - target)))


def _loss_by_width(scores: Scores, kinds: Collection[str]) -> dict[str, list[float]]:
    """Group -> list whose entry `n` is the estimated loss of all its units that go when it keeps `n`."""
    lost: dict[str, list[float]] = {}
    for group in scores.groups:
        if group.kind in kinds:
            order = torch.sort(scores.values[group.name], descending=True, stable=True).indices
            loss = scores.loss[group.name].double()[order]
            lost[group.name] = (loss.sum() - torch.cat([loss.new_zeros(1), loss.cumsum(0)])).tolist()
    return lost

"""From scores to a plan: which units stay, under which protocol, and what that costs."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..deploy import device_profiles
from ..errors import HywiaError, UsageError
from ..settings import DEFAULT_KINDS, KINDS, LAYOUTS
from ..types import Group, Plan, Scores
from .allocation import allocate

__all__ = ["check_kinds", "estimated_loss", "may_go", "plan", "ranked_again", "splits", "top_units"]

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
    split: Mapping[str, int] | None = None,
    spread: float = 1.0,
) -> Plan:
    """Choose the units to keep.

    Two protocols:

    * `ratio`: the share of all parameters to remove. Every layer gets the same width per kind, so that a stock config
      describes the result; widths are multiples of `align`, heads are whole. Of the width pairs that meet the ratio
      to within one alignment step, the one whose removed units add least to the loss by the scores' estimate is
      taken; scores without an estimate (magnitude, random) remove the same share of both kinds, as nearly as whole
      heads allow.
    * `group_ratio` with `layers=(first, end)`: the papers' protocol, that share of every listed layer's units.

    In both, units are ranked within their group, and of equals the lower index stays. With `layout="adaptive"` the
    layers share the same number of channels out among them by what their removal is estimated to add to the loss
    (see `allocation.allocate`); heads and experts keep the same share in every layer.

    Args:
        scores: of the model to prune.
        ratio: in (0, 1).
        group_ratio: in (0, 1), instead of `ratio`; or kind -> such a number, for the kinds that may go.
        layers: half-open range of layers for `group_ratio`; None: all.
        units: which kinds may go: "mlp", "attention" or both; or, in models that have them, whole "experts", with
            or without "attention".
        align: widths of channels are multiples of it, or untouched; None: what suits the device at hand
            (`device_profiles.at_hand`).
        layout: "uniform" or "adaptive".
        limits: gives the widths of a group that may be chosen (`serving_rules.allowed`, or those that suit a device);
            None: all.
        split: with `ratio`, the widths by kind to take instead of those of the least estimated loss: one of `splits`.
        spread: with `layout="adaptive"`, how far the estimates set layers apart, in [0, 1]; see `allocation.allocate`.

    Raises:
        UsageError: arguments outside the above, or a ratio that these units cannot reach.
    """
    scores.check()
    kinds = _kinds(tuple(group_ratio) if isinstance(group_ratio, Mapping) else units, scores.groups)
    if layout not in LAYOUTS:
        raise UsageError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if not 0.0 <= spread <= 1.0:
        raise UsageError(f"spread: expected a number from 0 to 1, got {spread}")
    align = _checked_align(align)
    if (ratio is None) == (group_ratio is None):
        raise UsageError("ratio: expected exactly one of ratio and group_ratio")
    if ratio is not None:
        _in_unit_interval("ratio", ratio)
        if layers is not None:
            raise UsageError("layers: goes with group_ratio; ratio prunes every layer to the same width")
        counts = _uniform(scores, ratio, kinds, align, limits, split)
        request: dict[str, Any] = {"protocol": "ratio", "ratio": ratio}
    else:
        assert group_ratio is not None
        if split is not None:
            raise UsageError("split: goes with ratio; group_ratio says the widths itself")
        shares = dict(group_ratio) if isinstance(group_ratio, Mapping) else dict.fromkeys(kinds, group_ratio)
        for share in shares.values():
            _in_unit_interval("group_ratio", share)
        counts = _per_group(scores, shares, layers, align, limits, isinstance(group_ratio, Mapping))
        given = dict(group_ratio) if isinstance(group_ratio, Mapping) else group_ratio
        request = {"protocol": "group_ratio", "group_ratio": given, "layers": layers and list(layers)}
    if layout == "adaptive":
        first, end = layers or (0, 1 + max(g.layer for g in scores.groups))
        free = [g for g in scores.groups if g.kind == "mlp" and "mlp" in kinds and first <= g.layer < end]
        widths = {g.name: _widths(g, align, limits) for g in free}
        _some_width(free, widths)
        counts |= allocate(scores, counts, free, widths, spread)
    request |= {"units": list(kinds), "align": align, "layout": layout}
    keep = {g.name: top_units(scores.values[g.name], counts[g.name]) for g in scores.groups}
    removed = sum((g.units - counts[g.name]) * g.unit_parameters for g in scores.groups)
    return Plan(
        groups=scores.groups,
        keep=keep,
        parameters_before=scores.parameters,
        parameters_after=scores.parameters - removed,
        layout=_layout(scores.groups, counts),
        fingerprint=scores.fingerprint,
        record={**request, "scores": dict(scores.record)},
    )


def splits(
    scores: Scores,
    *,
    ratio: float,
    units: Sequence[str] = DEFAULT_KINDS,
    align: int = 64,
    limits: Limits | None = None,
    **_: Any,
) -> list[dict[str, int]]:
    """Every way to share a ratio out among the kinds of units, in the arguments of `plan`: kind -> width of all layers.

    There is one for each count of heads, with the other kind's width that comes nearest. The first one is what `plan`
    chooses, and the others follow in the order in which it would.

    Raises:
        UsageError: as `plan`.
    """
    scores.check()
    _in_unit_interval("ratio", ratio)
    return _splits(scores, ratio, _kinds(units, scores.groups), _checked_align(align), limits)


def estimated_loss(scores: Scores, plan: Plan) -> float | None:
    """The sum of the loss estimates of the units that go, in nats; None for scores that estimate none."""
    if not scores.loss:
        return None
    total = 0.0
    for group in scores.groups:
        loss = scores.loss[group.name].double()
        total += float(loss.sum() - loss[plan.keep[group.name]].sum())
    return total


def may_go(
    groups: Sequence[Group],
    *,
    group_ratio: float | Mapping[str, float] | None = None,
    layers: tuple[int, int] | None = None,
    units: Sequence[str] = DEFAULT_KINDS,
    **_: Any,
) -> Callable[[Group], bool]:
    """Whether a request, in the arguments of `plan`, may cut a group: a test of the group's kind and layer."""
    kinds = _kinds(tuple(group_ratio) if isinstance(group_ratio, Mapping) else units, groups)
    first, end = _span(groups, layers)
    return lambda group: group.kind in kinds and first <= group.layer < end


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
    missing = set(chosen) - {g.kind for g in groups}
    if missing:
        has = ", ".join(k for k in KINDS if any(g.kind == k for g in groups))
        raise UsageError(f"units: the model has no {', '.join(sorted(missing))} to cut, only {has}; leave it out")
    empty = next((g.name for g in groups if g.kind in chosen and not g.unit_parameters), None)
    if empty is not None:
        raise UsageError(f"scores: expected units that hold parameters, got {empty}, whose units hold none")
    if {"mlp", "experts"} <= set(chosen):
        raise UsageError(
            "units: expected mlp or experts, got both, which hold each other; cut one, score again, then cut the other"
        )
    return chosen


def _checked_align(align: int | None) -> int:
    if align is None:
        align = device_profiles.at_hand().align
    if align < 1:
        raise UsageError(f"align: expected at least 1, got {align}")
    return align


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
) -> dict[str, int]:
    first, end = _span(scores.groups, layers)
    counts = {g.name: g.units for g in scores.groups}
    cut = [g for g in scores.groups if g.kind in shares and first <= g.layer < end]
    widths = {g.name: _widths(g, align, limits) for g in cut}
    _some_width(cut, widths)
    for group in cut:
        target = group.units * (1.0 - shares[group.kind])
        # Nearest allowed width; of two equally near the wider, which removes less.
        counts[group.name] = min(widths[group.name], key=lambda w: (abs(w - target), -w))
    whole = [k for k in shares if all(counts[g.name] == g.units for g in cut if g.kind == k)]
    # One share for all kinds may leave one of them whole; a share of its own must do something.
    if whole and (named or len(whole) == len(shares)):
        given = ", ".join(str(s) for s in dict.fromkeys(shares[k] for k in whole))
        raise UsageError(
            f"group_ratio: {given} rounds to nothing with align={align} and whole heads"
            + (f" for {' and '.join(whole)}" if named else "")
            + f"; ask for more, or a smaller align{_too_wide(cut, align)}"
        )
    return counts


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


def _uniform(
    scores: Scores,
    ratio: float,
    kinds: tuple[str, ...],
    align: int,
    limits: Limits | None,
    split: Mapping[str, int] | None,
) -> dict[str, int]:
    found = _splits(scores, ratio, kinds, align, limits)
    if split is not None and dict(split) not in found:
        raise UsageError(f"split: expected one of {found}, got {dict(split)}")
    chosen = found[0] if split is None else split
    return {g.name: chosen.get(g.kind, g.units) for g in scores.groups}


def _splits(
    scores: Scores, ratio: float, kinds: tuple[str, ...], align: int, limits: Limits | None
) -> list[dict[str, int]]:
    """`splits`."""
    options = {kind: _uniform_widths(scores, kind, align, limits) for kind in kinds}
    base = {kind: [g for g in scores.groups if g.kind == kind] for kind in kinds}
    cost = {kind: sum(g.unit_parameters for g in base[kind]) for kind in kinds}
    present = {kind: base[kind][0].units for kind in kinds}
    target = ratio * scores.parameters

    candidates: list[tuple[float, dict[str, int]]] = []  # (parameters removed, width by kind)
    for widths in itertools.product(*options.values()):
        choice = dict(zip(options, widths, strict=True))
        removed = sum((present[k] - v) * cost[k] for k, v in choice.items())
        if removed > 0:
            candidates.append((removed, choice))
    # One alignment step: of the channels when they may go, of experts or heads otherwise.
    fine = kinds[0] if "experts" not in kinds else "experts"
    step = (min(align, present[fine]) if fine == "mlp" else 1) * cost[fine]
    near = [c for c in candidates if abs(c[0] - target) <= step]
    if not near:
        reach = sorted(c[0] / scores.parameters for c in candidates)
        span = f"[{reach[0]:.4f}, {reach[-1]:.4f}]; the largest is {reach[-1]:.4f}" if reach else "nothing"
        raise UsageError(
            f"ratio: {ratio} cannot be reached to within one step of {step / scores.parameters:.4f}; "
            f"{' and '.join(kinds)} with align={align} reach {span}{_too_wide(scores.groups, align)}"
        )
    return _by_loss(scores, near, target, present, step)


def _uniform_widths(scores: Scores, kind: str, align: int, limits: Limits | None) -> list[int]:
    members = [g for g in scores.groups if g.kind == kind]
    if len({g.units for g in members}) != 1:
        raise HywiaError(
            f"ratio: the layers' {kind} widths differ already, so one width for all cannot be cut; use group_ratio"
        )
    stock = members[0].stock_counts
    return [w for w in _widths(members[0], align, limits) if kind != "attention" or not stock or w in stock]


def _by_loss(
    scores: Scores,
    near: list[tuple[float, dict[str, int]]],
    target: float,
    present: dict[str, int],
    step: float,
) -> list[dict[str, int]]:
    """The width pairs that come nearest to the target, one for each count of heads, in ascending order of the loss."""
    by_heads: dict[int | None, tuple[float, dict[str, int]]] = {}
    for removed, choice in near:
        key = choice.get("attention")
        best = by_heads.get(key)
        if best is None or abs(removed - target) < abs(best[0] - target):
            by_heads[key] = (removed, choice)
    # A pair on the far side of half a step is kept only when nothing nearer exists.
    within = [c for c in by_heads.values() if abs(c[0] - target) <= step / 2] or list(by_heads.values())
    if scores.loss:
        loss = _loss_by_width(scores, within[0][1])
        within.sort(key=lambda c: (sum(loss[k][w] for k, w in c[1].items()), abs(c[0] - target)))
    else:
        within.sort(key=lambda c: (_unevenness(c[1], present), abs(c[0] - target)))
    return [choice for _, choice in within]


def _loss_by_width(scores: Scores, kinds: Iterable[str]) -> dict[str, list[float]]:
    """Kind -> list whose entry `n` is the estimated loss of all units that go when each group keeps `n`."""
    lost: dict[str, Tensor] = {}
    for group in scores.groups:
        if group.kind in kinds:
            order = torch.sort(scores.values[group.name], descending=True, stable=True).indices
            loss = scores.loss[group.name].double()[order]
            gone = loss.sum() - torch.cat([loss.new_zeros(1), loss.cumsum(0)])
            lost[group.kind] = lost[group.kind] + gone if group.kind in lost else gone
    return {kind: by_count.tolist() for kind, by_count in lost.items()}


def _unevenness(choice: dict[str, int], present: dict[str, int]) -> float:
    shares = [1.0 - width / present[kind] for kind, width in choice.items()]
    return max(shares) - min(shares)

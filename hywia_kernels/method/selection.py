"""From scores to a plan: which units stay, under which protocol, and what that costs."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..deploy import device_profiles
from ..errors import UsageError
from ..settings import DEFAULT_KINDS, KINDS, LAYOUTS
from ..types import Depth, Group, Plan, Scores, channels_of_gone_experts, removed_parameters
from .allocation import allocate
from .depth import check_layers_gone, chosen, loss_by_count, shared_out, staying_groups
from .ratio import Limits, candidates, some_width, too_wide, uniform, widths_of

__all__ = [
    "check_kinds",
    "estimated_loss",
    "may_go",
    "plan",
    "ranked_again",
    "requested_kinds",
    "splits",
    "top_units",
]


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
        units: which kinds may go: "mlp", "attention" and, in models that have them, whole "experts", beside which
            "mlp" means channels of the experts that stay; and whole "layers", where the scores have them
            (`rank_layers`).
        align: widths of channels are multiples of it, or untouched; None: what suits the device at hand
            (`device_profiles.at_hand`).
        layout: "uniform" or "adaptive".
        limits: gives the widths of a group that may be chosen (`serving_rules.allowed`, or those that suit a device);
            None: all.
        split: with `ratio`, the widths by kind to take instead of those of the least estimated loss: one of `splits`.
        spread: with `layout="adaptive"`, how far the estimates set layers apart, in [0, 1]; see `allocation.allocate`.
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
    if not 0.0 <= spread <= 1.0:
        raise UsageError(f"spread: expected a number from 0 to 1, got {spread}")
    align = _checked_align(align)
    if (ratio is None) == (group_ratio is None):
        raise UsageError("ratio: expected exactly one of ratio and group_ratio")
    if ratio is not None:
        _in_unit_interval("ratio", ratio)
        if layers is not None:
            raise UsageError("layers: goes with group_ratio; ratio prunes every layer to the same width")
        check_layers_gone(scores, kinds, layers_gone)
        counts, depth = uniform(scores, ratio, kinds, align, limits, layers_gone, split)
        request: dict[str, Any] = {"protocol": "ratio", "ratio": ratio}
    else:
        assert group_ratio is not None
        if split is not None:
            raise UsageError("split: goes with ratio; group_ratio says the widths itself")
        if layers_gone is not None:
            raise UsageError("layers_gone: goes with ratio; group_ratio says the share of layers itself")
        shares = dict(group_ratio) if isinstance(group_ratio, Mapping) else dict.fromkeys(kinds, group_ratio)
        for share in shares.values():
            _in_unit_interval("group_ratio", share)
        counts, depth = _per_group(scores, shares, layers, align, limits, isinstance(group_ratio, Mapping))
        given = dict(group_ratio) if isinstance(group_ratio, Mapping) else group_ratio
        request = {"protocol": "group_ratio", "group_ratio": given, "layers": layers and list(layers)}
    keep = {g.name: top_units(scores.values[g.name], counts[g.name]) for g in scores.groups}
    if layout == "adaptive":
        first, end = layers or (0, 1 + max(g.layer for g in scores.groups))
        staying = staying_groups(scores.groups, depth)
        gone = channels_of_gone_experts(staying, keep)
        free = [g for g in staying if g.kind == "mlp" and "mlp" in kinds and first <= g.layer < end]
        free = [g for g in free if g.name not in gone]
        widths = {g.name: widths_of(g, align, limits) for g in free}
        some_width(free, widths)
        counts |= allocate(scores, counts, free, widths, spread)
        by_stack = {g.tied_width: counts[g.name] for g in free if g.tied_width}
        counts |= {g.name: by_stack.get(g.tied_width, counts[g.name]) for g in staying if g.name in gone}
        keep = {g.name: top_units(scores.values[g.name], counts[g.name]) for g in scores.groups}
    request |= {"units": list(kinds), "align": align, "layout": layout}
    if depth is not None and scores.layers is not None:
        request["layers_by"] = scores.layers.record.get("by")
    removed = removed_parameters(staying_groups(scores.groups, depth), counts)
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


def splits(
    scores: Scores,
    *,
    ratio: float,
    units: Sequence[str] = DEFAULT_KINDS,
    align: int = 64,
    limits: Limits | None = None,
    **_: Any,
) -> list[dict[str, int]]:
    """Every way to share a ratio out among the kinds of units, in the arguments of `plan`: kind -> width of all layers,
    and "layers" -> how many stay, where these may go.

    There is one for each count of layers and heads, with the other kind's width that comes nearest. The first one is
    what `plan` chooses, and the others follow in the order in which it would.

    Raises:
        UsageError: as `plan`.
    """
    scores.check()
    _in_unit_interval("ratio", ratio)
    found = candidates(scores, ratio, _kinds(units, scores.groups), _checked_align(align), limits)
    return [candidate.split for candidate in found]


def estimated_loss(scores: Scores, plan: Plan) -> float | None:
    """The sum of the loss estimates of the units that go, in nats; None for scores that estimate none."""
    if not scores.loss:
        return None
    by_count = None if scores.layers is None else loss_by_count(scores.layers)
    total = 0.0 if plan.depth is None or by_count is None else by_count[len(plan.depth.gone)]
    gone = channels_of_gone_experts(plan.staying, plan.keep)  # whose loss is their expert's
    for group in plan.staying:
        if group.name in gone:
            continue
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
    widths = {g.name: widths_of(g, align, limits) for g in cut}
    some_width(cut, widths)
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
            + f"; ask for more, or a smaller align{too_wide(cut, align)}"
        )
    return counts, depth


def _span(groups: Sequence[Group], layers: tuple[int, int] | None) -> tuple[int, int]:
    """`layers`, or the range of all layers for None; raises UsageError where it is out of range."""
    depth = 1 + max(g.layer for g in groups)
    first, end = layers if layers is not None else (0, depth)
    if not 0 <= first < end <= depth:
        raise UsageError(f"layers: expected FIRST:END with 0 <= FIRST < END <= {depth}, got {first}:{end}")
    return first, end

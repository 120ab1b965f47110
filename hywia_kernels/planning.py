"""A plan for a device and for the software that will serve the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import constraints, selection, targets
from .errors import UsageError
from .speed.work import work_of
from .types import Group, Plan, Scores

__all__ = ["plan_for", "with_prediction"]

Limit = Callable[[Group, list[int]], list[int]]


def plan_for(
    scores: Scores,
    *,
    target: str | Path | targets.Target | None = None,
    serve: Sequence[str] = constraints.DEFAULT,
    tensor_parallel: int = 1,
    align: int | None = None,
    **request: Any,
) -> Plan:
    """`selection.plan` with widths that a device runs well and servers accept.

    The alignment is the target's, and of the widths so aligned those are preferred that no wider one is as fast as.
    Both give way to an `align` of the caller's own. The plan's record names the target, the constraints that exclude
    any width of this model, and which of them bind: without such a one other widths would have been chosen.

    Args:
        scores: of the model to prune. target: as `targets.resolve` takes it; None: the device at hand.
        serve, tensor_parallel: as `constraints.constraints` takes them. align, request: as `selection.plan` takes them.

    Raises:
        UsageError: an unknown target or server, or a request that no widths meet.
    """
    device = target if isinstance(target, targets.Target) else targets.resolve(target)
    rules = constraints.constraints(serve, tensor_parallel)
    step = device.align if align is None else align
    preferred = _worthwhile(device) if align is None else None
    chosen = _plan(scores, rules, preferred, step, request)
    # Identical rules of two servers hide each other one by one, so all rules of one effect are left out together.
    binding = [
        rule.name
        for rule in rules
        if _excludes(rule, scores.groups)
        and _counts(_plan(scores, [r for r in rules if not _same(r, rule, scores.groups)], preferred, step, request))
        != _counts(chosen)
    ]
    record = {
        **chosen.record,
        "target": device.described(),
        "constraints": [f"{r.name}: {r.says}" for r in rules if _excludes(r, scores.groups)],
        "binding": binding,
    }
    return dataclasses.replace(chosen, record=record)


def _counts(plan: Plan) -> dict[str, int]:
    return {name: keep.numel() for name, keep in plan.keep.items()}


def _excludes(rule: constraints.Constraint, groups: Sequence[Group]) -> bool:
    shapes = {(g.kind, g.units): g for g in groups}.values()
    return any(not rule.admits(g, w) for g in shapes for w in range(1, g.units))


def _same(one: constraints.Constraint, other: constraints.Constraint, groups: Sequence[Group]) -> bool:
    shapes = {(g.kind, g.units): g for g in groups}.values()
    return all(one.admits(g, w) == other.admits(g, w) for g in shapes for w in range(1, g.units))


def _worthwhile(device: targets.Target) -> Limit | None:
    if not device.has_rates:
        return None
    return lambda group, widths: device.worthwhile(widths) if group.kind == "mlp" else widths


def _plan(
    scores: Scores,
    rules: Sequence[constraints.Constraint],
    preferred: Limit | None,
    align: int,
    request: dict[str, Any],
) -> Plan:
    admitted = constraints.allowed(rules)
    if preferred is not None:
        try:
            return selection.plan(scores, align=align, limits=lambda g, w: preferred(g, admitted(g, w)), **request)
        except UsageError:
            pass  # fewer widths may not meet the ratio; all aligned ones are asked next
    return selection.plan(scores, align=align, limits=admitted, **request)


def with_prediction(plan: Plan, model: Any, target: str | Path | targets.Target | None = None) -> Plan:
    """The plan with what it should gain on the target in its record: `prediction`, times before over times after."""
    device = target if isinstance(target, targets.Target) else targets.resolve(target)
    found = targets.predict(work_of(model), work_of(model, plan), device)
    prediction = {
        "target": device.described(": by FLOPs"),
        "prefill": {str(t): round(s, 4) for t, s in found.prefill.items()},
        "decode": round(found.decode, 4),
        "size": round(found.size, 4),
    }
    return dataclasses.replace(plan, record={**plan.record, "prediction": prediction})

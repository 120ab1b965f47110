"""A plan for a device and for the software that will serve the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import arch
from ..arch.facts import count_parameters
from ..errors import UsageError
from ..method import selection
from ..method.depth import unmeasured
from ..method.search import Choices
from ..types import Group, Plan, Scores
from . import device_profiles, serving_rules
from .cost import cost_of

__all__ = ["alike", "check_reachable", "choices", "plan_for", "with_prediction"]

Limit = Callable[[Group, list[int]], list[int]]
_Made = TypeVar("_Made")
_SPREADS = (0.0, 0.5, 1.0)  # from equal shares to those that the estimates give


def plan_for(
    scores: Scores,
    *,
    target: str | Path | device_profiles.Target | None = None,
    serve: Sequence[str] = serving_rules.DEFAULT,
    tensor_parallel: int = 1,
    align: int | None = None,
    **request: Any,
) -> Plan:
    """`selection.plan` with widths that a device runs well and servers accept.

    The alignment is the target's, and among aligned widths those are preferred that are faster than every wider one.
    Both give way to an `align` of the caller's own, and so do rules that are wishes. The plan's record names the
    target, the servers' rules that exclude any width of this model and are kept ("constraints"), and those that the
    widths chosen without any rule would have broken ("binding").

    Args:
        scores: of the model to prune. target: as `device_profiles.resolve` takes it; None: the device at hand.
        serve, tensor_parallel: as `serving_rules.constraints` takes them.
        align, request: as `selection.plan` takes them.

    Raises:
        UsageError: an unknown target or server, a request that no widths meet, or a server's rule that what is not cut
            breaks.
    """
    device = target if isinstance(target, device_profiles.Target) else device_profiles.resolve(target)
    rules = _rules(serve, tensor_parallel, align)
    excluding = [r for r in rules if _excludes(r, scores.groups)]
    step, preferred = _widths_of(device, align)
    binding: list[str] = []
    if not excluding:
        chosen = _plan(scores, (), preferred, step, request)
    else:
        serving_rules.check_untouched(rules, scores.groups, selection.may_go(scores.groups, **request))
        try:
            chosen = _plan(scores, rules, preferred, step, request)
        except UsageError as error:
            raise UsageError(
                f"{error}; {', '.join(r.name for r in excluding)} leave fewer widths: another --serve or "
                "--tensor-parallel would leave more"
            ) from error
        cut = [(g, n) for g in scores.groups if 0 < (n := chosen.keep[g.name].numel()) < g.units]
        excluding = [r for r in excluding if not r.wish or all(r.admits(g, n) for g, n in cut)]
        free = _free_widths(scores, preferred, step, request)
        binding = [r.name for r in excluding if not all(r.admits(g, w) for g, w in free if r.hard or w < g.units)]
    record = {
        **chosen.record,
        "target": device.described(),
        "constraints": [f"{r.name}: {r.says}" for r in excluding],
        "binding": binding,
    }
    return dataclasses.replace(chosen, record=record)


def choices(
    scores: Scores,
    *,
    target: str | Path | device_profiles.Target | None = None,
    serve: Sequence[str] = serving_rules.DEFAULT,
    tensor_parallel: int = 1,
    align: int | None = None,
    layout: str = "uniform",
    **request: Any,
) -> Choices:
    """The plans that meet a request, in the arguments of `plan_for`, which gives the first of them.

    A ratio leaves the share of each kind of units open, an adaptive layout how far layers differ; `plan_for` decides
    both by the scores' estimates alone.

    Raises:
        UsageError: as `plan_for`.
    """
    device = target if isinstance(target, device_profiles.Target) else device_profiles.resolve(target)
    found: Sequence[dict[str, int] | None] = [None]
    if request.get("ratio") is not None:
        step, preferred = _widths_of(device, align)
        rules = [r for r in _rules(serve, tensor_parallel, align) if _excludes(r, scores.groups)]
        found = _limited(
            lambda limits: selection.splits(scores, align=step, limits=limits, **request), rules, preferred
        )
    common: dict[str, Any] = {
        "target": device,
        "serve": serve,
        "tensor_parallel": tensor_parallel,
        "align": align,
        "layout": layout,
    }
    return Choices(
        splits=found,
        spreads=_SPREADS if layout == "adaptive" else _SPREADS[-1:],
        plan=lambda split, spread: plan_for(scores, **common, **request, split=split, spread=spread),
    )


def check_reachable(
    model: Any, scores: Scores | None = None, *, criterion: str | None = "hywia", **request: Any
) -> Plan:
    """Make sure that a request can be planned before anything is measured. Reachable widths, servers' rules, layers and
    kinds depend on the model alone, and so does whether its config can describe fewer layers.

    Args:
        model: the model to prune. scores: its scores, where there are some already. criterion: what it is to be scored
            by; only "hywia" estimates the loss. request: as `plan_for` takes it.

    Returns:
        A plan of the request's size; without scores, which of its widths and units they are is not known yet.

    Raises:
        UsageError, HywiaError: what `plan_for` would raise with the model's scores; a server's rule that the vocabulary
            breaks.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    serving_rules.check_vocabulary(
        request.get("serve", serving_rules.DEFAULT), request.get("tensor_parallel", 1), vocabulary
    )
    scores = alike(model, criterion) if scores is None else scores
    if "layers" in selection.requested_kinds(**request):
        depth = len(arch.layers_of(model))
        if depth > 1:  # without the first one, every other layer changes its place
            arch.check_depth(model, range(1, depth))
        if scores.layers is None:
            scores = dataclasses.replace(scores, layers=unmeasured(arch.layer_parameters(model)))
    return plan_for(scores, **request)


def alike(model: Any, criterion: str | None = "hywia") -> Scores:
    """Scores by which all units are worth the same, to plan with before a model is scored."""
    groups = arch.groups(model)
    values = {g.name: torch.zeros(g.units) for g in groups}
    loss = values if criterion == "hywia" else {}
    return Scores(groups, values, loss, count_parameters(model), "", {"criterion": criterion})


def _free_widths(
    scores: Scores, preferred: Limit | None, align: int, request: dict[str, Any]
) -> list[tuple[Group, int]]:
    """What each group would keep if servers had no rules; the present widths where nothing would be cut."""
    request = {name: value for name, value in request.items() if name != "split"}  # which may be one of the rules' own
    try:
        keep = _plan(scores, (), preferred, align, request).keep
    except UsageError:
        return [(g, g.units) for g in scores.groups]
    return [(g, keep[g.name].numel()) for g in scores.groups]


def _excludes(rule: serving_rules.Constraint, groups: Sequence[Group]) -> bool:
    """Whether a rule forbids any width of this model, the present ones included where it is hard."""
    shapes = {(g.kind, g.units): g for g in groups}.values()
    return any(not rule.admits(g, w) for g in shapes for w in range(1, g.units + rule.hard))


def _widths_of(device: device_profiles.Target, align: int | None) -> tuple[int, Limit | None]:
    """What channel widths are multiples of, and which of them are preferred."""
    return (device.align, _pareto_limit(device)) if align is None else (align, None)


def _pareto_limit(device: device_profiles.Target) -> Limit | None:
    """The limit that leaves of MLP widths those that pay on the device; None where it has no rates."""
    if not device.has_rates:
        return None
    return lambda group, widths: device.pareto_widths(widths) if group.kind == "mlp" else widths


def _plan(
    scores: Scores,
    rules: Sequence[serving_rules.Constraint],
    preferred: Limit | None,
    align: int,
    request: dict[str, Any],
) -> Plan:
    return _limited(lambda limits: selection.plan(scores, align=align, limits=limits, **request), rules, preferred)


def _limited(
    make: Callable[[Limit], _Made], rules: Sequence[serving_rules.Constraint], preferred: Limit | None
) -> _Made:
    """What is made within the widths that the rules admit: if they suffice, among the preferred ones and with the
    rules that are wishes, with one of the two where not with both, the preferred ones first."""
    firm = [rule for rule in rules if not rule.wish]
    for kept, liked in ((rules, preferred), (firm, preferred), (rules, None)):
        if liked is None and len(kept) == len(firm):
            continue  # nothing to give up
        try:
            return make(_limit(kept, liked))
        except UsageError:
            pass  # fewer widths may not meet the ratio
    return make(_limit(firm, None))


def _limit(rules: Sequence[serving_rules.Constraint], preferred: Limit | None) -> Limit:
    admitted = serving_rules.allowed(rules)
    return admitted if preferred is None else lambda g, w: preferred(g, admitted(g, w))


def _rules(serve: Sequence[str], tensor_parallel: int, align: int | None) -> list[serving_rules.Constraint]:
    """The servers' rules, without their wishes where the caller has an alignment of his own."""
    rules = serving_rules.constraints(serve, tensor_parallel)
    return [rule for rule in rules if align is None or not rule.wish]


def with_prediction(
    plan: Plan,
    model: Any,
    target: str | Path | device_profiles.Target | None = None,
    serve: Sequence[str] = serving_rules.DEFAULT,
) -> Plan:
    """The plan, with what it should gain on the target in its record as "prediction": times before over times after;
    and as "note" what the servers may make of layers that have moved up."""
    device = target if isinstance(target, device_profiles.Target) else device_profiles.resolve(target)
    speedups = device_profiles.predict(cost_of(model), cost_of(model, plan), device)
    prediction = {
        "target": device.described(": by FLOPs"),
        "prefill": {str(t): round(s, 4) for t, s in speedups.prefill.items()},
        "decode": round(speedups.decode, 4),
        "size": round(speedups.size, 4),
    }
    types = getattr(arch.text_config(model), "layer_types", None)
    heads = any(g.kind == "attention" and plan.keep[g.name].numel() < g.units for g in plan.staying)
    notes = [serving_rules.heads_note(serve, arch.text_config(model).model_type, heads)]
    if plan.depth is not None:
        notes.append(serving_rules.pattern_note(serve, types, plan.depth.keep))
    note = "; ".join(note for note in notes if note is not None)
    noted = {"note": note} if note else {}
    return dataclasses.replace(plan, record={**plan.record, **noted, "prediction": prediction})

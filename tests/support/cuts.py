"""Plans named by what they cut, ranked by seeded random scores."""

from __future__ import annotations

import copy

import torch

import hywia_kernels as hk

from .comparison import logits

CUTS = ("mlp", "attention", "both", "adaptive")


def make_plan(model, cut: str) -> hk.Plan:
    """What its name says: adaptive, which leaves the first layer alone, is of both kinds unless one stands behind a
    dash; all is of both kinds and whole experts; one-head removes as few heads as there can be."""
    scores = hk.score(model, criterion="random", seed=5)
    if cut == "one-head":
        return hk.plan(scores, group_ratio=0.2, units=("attention",))
    shape, _, kind = cut.partition("-")
    kind = kind or shape
    layers = (1, 3) if shape == "adaptive" else None
    several = dict.fromkeys(("both", "adaptive"), ("mlp", "attention")) | {"all": ("mlp", "attention", "experts")}
    units = several.get(kind, (kind,))
    return hk.plan(scores, group_ratio=0.4, layers=layers, units=units, align=4)


def masked_logits(model, plan, tokens):
    """Of a copy of the model whose removed units are masked to zero."""
    masked = copy.deepcopy(model)
    hk.mask(masked, plan)
    return logits(masked, tokens)


def layer_plan(model, keep, *, units=(), only: int | None = None) -> hk.Plan:
    """A plan that keeps the layers `keep`, and of these the first units.

    Args:
        units: kinds that lose four in ten units as well, to a multiple of four channels. only: of this layer alone.
    """
    scores = hk.score(model, criterion="random", seed=5)
    parameters = scores.layers.parameters
    kept = {}
    for group in scores.groups:
        count = group.units if group.layer in keep else 0
        if group.layer in keep and group.kind in units and only in (None, group.layer):
            count = max(group.min_units, round(0.6 * group.units) // (4 if group.kind == "mlp" else 1))
            count *= 4 if group.kind == "mlp" else 1
        kept[group.name] = torch.arange(count)
    depth = hk.Depth(parameters, tuple(keep)) if len(keep) < len(parameters) else None
    removed = 0 if depth is None else depth.removed
    removed += sum((g.units - kept[g.name].numel()) * g.unit_parameters for g in scores.groups if g.layer in keep)
    after = scores.parameters - removed
    return hk.Plan(scores.groups, kept, scores.parameters, after, "uniform", scores.fingerprint, depth=depth)

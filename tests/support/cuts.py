"""Plans named by what they cut, ranked by seeded random scores."""

from __future__ import annotations

import copy

import hywia_kernels as hk

from .comparison import logits

CUTS = ("mlp", "attention", "both", "adaptive")


def make_plan(model, cut: str) -> hk.Plan:
    """What its name says: adaptive, which leaves the first layer alone, is of both kinds unless one stands behind a
    dash; one-head removes as few heads as there can be."""
    scores = hk.score(model, criterion="random", seed=5)
    if cut == "one-head":
        return hk.plan(scores, group_ratio=0.2, units=("attention",))
    shape, _, kind = cut.partition("-")
    kind = kind or shape
    layers = (1, 3) if shape == "adaptive" else None
    units = ("mlp", "attention") if kind in ("both", "adaptive") else (kind,)
    return hk.plan(scores, group_ratio=0.4, layers=layers, units=units, align=4)


def masked_logits(model, plan, tokens):
    """Of a copy of the model whose removed units are masked to zero."""
    masked = copy.deepcopy(model)
    hk.mask(masked, plan)
    return logits(masked, tokens)

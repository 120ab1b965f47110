"""How far apart two results are."""

from __future__ import annotations

import torch

ORDERS = ("first", "second", "mixed")


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def relative(got, want) -> float:
    """The norm of the difference over the norm of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def distance(one, two) -> float:
    """Of two models' statistics: the largest relative difference of any group's vector or matrix."""
    pairs = [(fine[order], two.fine[name][order]) for name, fine in one.fine.items() for order in ORDERS]
    pairs += [(one.coarse[name], two.coarse[name]) for name in one.fine]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)

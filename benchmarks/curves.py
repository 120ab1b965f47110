"""The page of `quality --figure`: shares removed in each layer, and perplexity by the share of channels removed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

import hywia_kernels as hk
from hywia_kernels.cli import charts
from hywia_kernels.settings import SAMPLES

from .cuts import Bench, split
from .settings import Setting

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625)


def removed_shares(bench: Bench, statistics: hk.Statistics, share: float) -> dict[str, list[float]]:
    """Fusion -> share of each layer's channels that it removes when all layers are ranked together.

    A single grain ranks the layers by its own second-order estimate of the loss, the hybrid ranks them as `plan` does.
    """
    removed = {}
    for name in ("fine", "coarse", "attention"):
        scores = hk.fuse(statistics, name)
        if name != "attention":
            scores = replace(scores, loss=scores.values)
        plan = hk.plan(scores, group_ratio={"mlp": share}, align=bench.align or 1, layout="adaptive")
        groups = [g for g in plan.groups if g.kind == "mlp"]
        removed["hybrid" if name == "attention" else name] = [1.0 - plan.keep[g.name].numel() / g.units for g in groups]
    return removed


def figure(bench: Bench, text: Tensor, seed: int, criteria: Sequence[str], batch: int) -> str:
    """An HTML page."""
    shares = removed_shares(bench, bench.statistics(seed, SAMPLES), 0.5)
    labels = [str(i) for i in range(len(next(iter(shares.values()))))]
    page = charts.bars(
        "Channels removed in each layer, half of all by one ranking", labels, shares, x_label="layer", y_label="share"
    )
    curves: dict[str, list[tuple[float, float]]] = {}
    for criterion in criteria:
        name, count = split(criterion)
        for share in SHARES:
            with bench.pruned(name, count, Setting({"mlp": share}), seed) as cut:
                value = math.log10(hk.perplexity(cut.model, text, batch=batch))
            curves.setdefault(criterion, []).append((share, value))
    page += charts.lines(
        "Perplexity", curves, x_label="share of channels removed", y_label="log10 perplexity", zero=False
    )
    return f"<!doctype html><meta charset=utf-8><title>Quality of pruned models</title>{page}"

"""How many whole layers a request takes, and which: those of the lowest scores, in their order."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import UsageError
from ..types import Depth, Group, LayerScores, Scores
from ..types.groups import is_count

__all__ = [
    "check_layers_gone",
    "chosen",
    "depths_of",
    "loss_by_count",
    "most_gone",
    "rank_layers",
    "shared_out",
    "staying_groups",
    "unmeasured",
]


def chosen(layers: LayerScores, gone: int, span: tuple[int, int] | None = None) -> Depth | None:
    """The depth without the `gone` layers that go first, of those in the half-open `span`; None where none goes."""
    if not gone:
        return None
    first, end = span or (0, len(layers.parameters))
    going = set([i for i in layers.order if first <= i < end][:gone])
    return Depth(layers.parameters, tuple(i for i in range(len(layers.parameters)) if i not in going))


def depths_of(scores: Scores, layers_gone: int | None) -> list[Depth | None]:
    """The depths that a request by ratio may choose from: each number of layers gone, or the one that it names."""
    assert scores.layers is not None
    counts = range(len(scores.layers.parameters)) if layers_gone is None else (layers_gone,)
    return [chosen(scores.layers, n) for n in counts]


def check_layers_gone(scores: Scores, kinds: Collection[str], layers_gone: int | None) -> None:
    """Raise UsageError where a request names a number of layers that cannot go."""
    if layers_gone is None:
        return
    if "layers" not in kinds or scores.layers is None:
        raise UsageError("layers_gone: goes with layers among the units that may go")
    most = len(scores.layers.parameters) - 1
    if not is_count(layers_gone, 0) or layers_gone > most:
        raise UsageError(f"layers_gone: expected 0 to {most}, got {layers_gone!r}")


def staying_groups(groups: Sequence[Group], depth: Depth | None) -> list[Group]:
    """The groups of the layers that stay."""
    gone = () if depth is None else depth.gone
    return [g for g in groups if g.layer not in gone]


def loss_by_count(layers: LayerScores) -> list[float] | None:
    """Entry `n`: the estimated loss of the `n` layers that go first; None where the scores have no estimate."""
    if layers.loss is None:
        return None
    return [0.0, *layers.loss.double()[torch.tensor(layers.order)].cumsum(0).tolist()]


def shared_out(layers: LayerScores, share: float, span: tuple[int, int]) -> int:
    """How many layers a share of those in `span` is: the nearest number, the smaller of two as near. One layer of the
    model stays in any case."""
    count = span[1] - span[0]
    most = min(count, len(layers.parameters) - 1)
    return min(range(most + 1), key=lambda n: (abs(n - share * count), n))


def most_gone(
    parameters: Sequence[int],
    total: int,
    *,
    ratio: float | None = None,
    group_ratio: float | Mapping[str, float] | None = None,
    layers: tuple[int, int] | None = None,
    **_: Any,
) -> int:
    """How many layers a request, in the arguments of `selection.plan`, can take at the most.

    Args:
        parameters: of each layer. total: of the whole model.
    """
    most = len(parameters) - 1
    if ratio is not None:
        return min(most, math.ceil(ratio * total / min(parameters)) + 1)
    share = group_ratio["layers"] if isinstance(group_ratio, Mapping) else group_ratio or 0.0
    first, end = layers or (0, len(parameters))
    return min(most, math.ceil(share * (end - first)))


def rank_layers(scores: Scores, layers: LayerScores) -> Scores:
    """Scores with those of whole layers (`layer_influence`)."""
    return replace(scores, layers=layers, record={**scores.record, "layers": dict(layers.record)})


def unmeasured(parameters: tuple[int, ...]) -> LayerScores:
    """Scores that tell no layer apart: with these a request's size can be planned, and no more."""
    alike = torch.zeros(len(parameters))
    return LayerScores(parameters, alike, alike)

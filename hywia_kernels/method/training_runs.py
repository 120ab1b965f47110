"""What a layer is trained on, a step a run: parts of the longer runs of samples that everything else goes by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..engine.samples import Samples
from .layer_runs import Call, entrance
from .layer_targets import LayerTarget, Run

__all__ = ["TRAINED_TOKENS", "Part", "parted", "parts_of"]

TRAINED_TOKENS = 2048  # of a step


@dataclass(frozen=True)
class Part:
    """Some samples of a run, by their places in it: how they call every layer, and which of their positions are text.

    Attributes:
        samples: which they are. longest: tokens of the longest one. tokens: theirs among those without padding.
    """

    calls: list[Call]
    rows: Tensor | None
    samples: slice
    longest: int
    tokens: slice


def parts_of(model: Any, layers: nn.ModuleList, samples: Samples) -> list[Part]:
    """The parts of one run of samples, of at most `TRAINED_TOKENS` tokens each, or of one sample that is longer."""
    parts: list[Part] = []
    first = token = 0
    for some in samples.chunks(TRAINED_TOKENS):
        begin = entrance(model, layers, some)
        behind, end = first + len(some), token + some.total
        parts.append(Part(begin.calls, begin.rows, slice(first, behind), some.longest, slice(token, end)))
        first, token = behind, end
    return parts


def parted(
    parts: Sequence[Sequence[Part]], runs: Sequence[Run], targets: Sequence[LayerTarget]
) -> tuple[list[Run], list[LayerTarget]]:
    """What enters a layer and what should leave it, part by part: views of what the runs hold.

    Args:
        parts: of every run. targets: of every run; of theirs what leaves the layer, and the weights, are given.
    """
    made: list[Run] = []
    goals: list[LayerTarget] = []
    for own, run, target in zip(parts, runs, targets, strict=True):
        for part in own:

            def view(hidden: Tensor, part: Part = part) -> Tensor:
                return hidden[part.samples, : part.longest]

            made.append(Run(part.calls, view(run.dense), view(run.pruned), part.rows))
            goals.append(LayerTarget(view(target.out), {}, {}, target.weight[part.tokens], target.include_drift))
    return made, goals

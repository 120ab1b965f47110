"""What the dense model does, and a changed one is to do: hidden states of both, and what each layer should send on."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..engine.samples import Samples
from .layer_runs import Call, entrance, seen
from .moments import TINY, energy

__all__ = ["Journal", "LayerTarget", "Run", "gap_behind", "layer_target", "run_of"]


@dataclass
class Run:
    """One run of samples on its way through the layers: hidden states of the dense and of the pruned model."""

    calls: list[Call]
    dense: Tensor
    pruned: Tensor
    rows: Tensor | None  # positions without padding; None: all

    def flat(self, tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1, tensor.shape[-1])
        return flat if self.rows is None else flat.index_select(0, self.rows.to(flat.device))


def run_of(model: Any, layers: nn.ModuleList, samples: Samples) -> Run:
    begin = entrance(model, layers, samples)
    return Run(begin.calls, begin.hidden, begin.hidden, begin.rows)


class Journal:
    """What a pass notes between two layers, for a later one to go on from; here, nothing."""

    def resumed(self, runs: Sequence[Run], errors: dict[str, list[float]]) -> tuple[int, bool]:
        """`(the first layer that is not done, whether both models have the same hidden states before it)`; an earlier
        pass's hidden states are put into the runs, and its errors into `errors`."""
        return 0, True

    def finished(self, index: int, runs: Sequence[Run], same: bool, errors: Mapping[str, list[float]]) -> None:
        """A layer is done, and the runs hold what leaves it; `same` is of what `resumed` gives."""


@dataclass
class LayerTarget:
    """What the dense layer does with one run of samples.

    Of the matrix that sends on, whose equations are about what leaves the layer, its own output counts only by its
    energy; those of the others are held until their equations are there.
    """

    out: Tensor
    outputs: dict[nn.Module, Tensor]
    energies: dict[nn.Module, Tensor]  # weighted sums of squares, float64
    weight: Tensor  # [tokens without padding]
    include_drift: bool


def gap_behind(layers: nn.ModuleList, index: int, gone: Collection[int]) -> list[tuple[int, nn.Module]]:
    """The layers right behind one that go, each with its index."""
    behind = itertools.takewhile(lambda i: i in gone, range(index + 1, len(layers)))
    return [(i, layers[i]) for i in behind]


def layer_target(
    layer: nn.Module,
    index: int,
    additive: Mapping[nn.Module, bool],
    run: Run,
    include_drift: bool,
    gap: Sequence[tuple[int, nn.Module]],
) -> LayerTarget:
    """What one layer is to do for one run of samples.

    Args:
        additive: the modules whose matrices are solved, and whether what one gives is only added to what leaves.
        gap: layers that go behind this one; what leaves the last of them is what this one should send on.
    """
    with seen(list(additive)) as at:
        out = run.calls[index](layer, run.dense)
    for place, following in gap:
        out = run.calls[place](following, out)
    # The next norm divides by a token's rms, so errors count relative to it; tokens with huge activations (the first of
    # a text, usually) would decide the regression otherwise.
    weight = 1.0 / run.flat(out).float().square().mean(1).clamp(min=TINY)
    energies = {module: energy(run.flat(at[module][1].float()), weight) for module in additive}
    outputs = {module: at[module][1] for module, adds in additive.items() if not (include_drift and adds)}
    return LayerTarget(out, outputs, energies, weight, include_drift)

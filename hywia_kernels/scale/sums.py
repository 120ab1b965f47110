"""One layer's statistics while they are added up: a row of float64 numbers for each run of samples.

A row holds, group after group, the fine sums `n · fine` `[units]` of the run's `n` samples, then `Σ_s h_s` and
`Σ_s h_s²` `[members, units]` each. Every number of a row comes from one run alone, so rows that processes have made are
put together by adding zeros, which rounds nothing; then the rows are added in the runs' order, which every process does
alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.results import Results
from ..types import Group

__all__ = ["Layout", "first_bad"]


class Layout:
    """How one layer's groups lie in a row.

    Attributes:
        groups: the layer's, in the model's order. width: numbers of a row. order: of the fine sums.
    """

    def __init__(self, groups: Sequence[Group], order: str) -> None:
        self.groups, self.order = tuple(groups), order
        self._sizes = [g.units * (1 + 2 * len(g.members)) for g in self.groups]
        self.width = sum(self._sizes)

    def row(self, results: Results) -> Tensor:
        """The row of the run whose results these are, float64 `[width]` on their device."""
        parts = []
        for group in self.groups:
            coarse = results.coarse[group.name].double()
            parts.append(results.fine[group.name][0].double() * results.samples)
            parts += [coarse.sum(1).flatten(), coarse.square().sum(1).flatten()]
        return torch.cat(parts).add_(0.0)  # no zero is negative, as none is after zeros were added

    def finished(self, total: Tensor, samples: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """`(fine, moments)` of `Statistics` from the rows' sum `[width]` over so many samples."""
        fine: dict[str, dict[str, Tensor]] = {}
        moments: dict[str, Tensor] = {}
        for group, piece in zip(self.groups, total.split(self._sizes), strict=True):
            members = len(group.members)
            fine[group.name] = {self.order: (piece[: group.units] / samples).float()}
            moments[group.name] = (piece[group.units :] / samples).view(2, members, group.units).clone()
        return fine, moments


def first_bad(layout: Layout, total: Tensor) -> str | None:
    """The module whose gradient was the first in the backward's order to be NaN or Inf; None when all are finite."""
    if bool(torch.isfinite(total).all()):
        return None
    for group, piece in zip(reversed(layout.groups), reversed(total.split(layout._sizes)), strict=True):
        by_member = piece[group.units :].view(2, len(group.members), group.units)
        bad = (~torch.isfinite(by_member)).any(2).any(0).nonzero()[:, 0].tolist()
        if bad:
            return group.members[max(bad)].module
        if not bool(torch.isfinite(piece).all()):  # finite gradients whose squares are not
            return group.members[-1].module
    return None

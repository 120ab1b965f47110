"""One layer's statistics while they are added up: a row of float64 numbers for each run of samples.

A row holds, group after group, the fine sums `n · fine` `[orders, units]` of the run's `n` samples, then `Σ_s h_s` and
`Σ_s h_s²` `[members, units]` each. Every number of a row comes from one run alone, so rows that processes have made are
put together by adding zeros, which rounds nothing; then the rows are added in the runs' order, which every process does
alike. Of orders that do not add up over samples there is one row, of all samples, whose numbers `exchange` makes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..types import Group

__all__ = ["Layout", "first_bad"]


class Layout:
    """How one layer's groups lie in a row.

    Attributes:
        groups: the layer's, in the model's order. width: numbers of a row. orders: of the fine sums.
    """

    def __init__(self, groups: Sequence[Group], orders: Sequence[str]) -> None:
        self.groups, self.orders = tuple(groups), tuple(orders)
        self._fine = [g.units * len(self.orders) for g in self.groups]
        self._sizes = [f + 2 * g.units * len(g.members) for f, g in zip(self._fine, self.groups, strict=True)]
        self.width = sum(self._sizes)

    def row(self, fine: Mapping[str, Tensor], coarse: Mapping[str, Tensor]) -> Tensor:
        """A row, float64 `[width]`.

        Args:
            fine: group name -> `n · fine` over `n` samples, float64 `[orders, units]`.
            coarse: group name -> `h_s`, `[members, samples, units]`.
        """
        parts = []
        for group in self.groups:
            of = coarse[group.name].double()
            parts += [fine[group.name].flatten(), of.sum(1).flatten(), of.square().sum(1).flatten()]
        return torch.cat(parts).add_(0.0)  # no zero is negative, as none is after zeros were added

    def finished(self, total: Tensor, samples: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """`(fine, moments)` of `Statistics` from the rows' sum `[width]` over so many samples."""
        fine: dict[str, dict[str, Tensor]] = {}
        moments: dict[str, Tensor] = {}
        for group, of_fine, of_moments in self.pieces(total):
            fine[group.name] = dict(zip(self.orders, (of_fine / samples).float(), strict=True))
            moments[group.name] = of_moments / samples
        return fine, moments

    def pieces(self, total: Tensor) -> list[tuple[Group, Tensor, Tensor]]:
        """`(group, fine [orders, units], moments' sums [2, members, units])` of a row."""
        found = []
        for group, of_fine, piece in zip(self.groups, self._fine, total.split(self._sizes), strict=True):
            sums = piece[of_fine:].view(2, len(group.members), group.units)
            found.append((group, piece[:of_fine].view(len(self.orders), group.units), sums))
        return found


def first_bad(layout: Layout, total: Tensor) -> str | None:
    """The module whose gradient was the first in the backward's order to be NaN or Inf; None when all are finite."""
    if bool(torch.isfinite(total).all()):
        return None
    for group, fine, sums in reversed(layout.pieces(total)):
        bad = (~torch.isfinite(sums)).any(2).any(0).nonzero()[:, 0].tolist()
        if bad:
            return group.members[max(bad)].module
        if not bool(torch.isfinite(fine).all()):  # finite gradients whose squares are not
            return group.members[-1].module
    return None

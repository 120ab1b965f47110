"""Whether two engines measured the same: relative errors of the statistics, and the units that a cut would keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import hywia_kernels as hk
from hywia_kernels.settings import BLEND
from hywia_kernels.types import Statistics

BOUNDS = {"bfloat16": 1e-2, "float32": 1e-5}
RATIOS = (0.2, 0.5)


@dataclass(frozen=True)
class Agreement:
    """The largest error of any group, relative to the group's largest value, and ratio -> share of kept units in
    common."""

    fine: float
    coarse: float
    kept: dict[float, float]

    def within(self, bound: float) -> bool:
        return self.fine <= bound and self.coarse <= bound  # NaN is not


def _error(got: Tensor, want: Tensor) -> Tensor:
    return (got - want).abs().max() / want.abs().max()


def compare(got: Statistics, want: Statistics) -> Agreement:
    fine = [
        _error(got.fine[name][order], vector) for name, orders in want.fine.items() for order, vector in orders.items()
    ]
    coarse = [_error(got.coarse[name], matrix) for name, matrix in want.coarse.items()]
    return Agreement(
        float(torch.stack(fine).max()),
        float(torch.stack(coarse).max()),
        # By both grains, since both are compared.
        {ratio: _common(hk.fuse(got, BLEND), hk.fuse(want, BLEND), ratio) for ratio in RATIOS},
    )


def _common(got: hk.Scores, want: hk.Scores, ratio: float) -> float:
    a, b = (hk.plan(scores, group_ratio=ratio, align=1).keep for scores in (got, want))
    kept = sum(len(units) for units in b.values())
    return sum(len(set(a[name].tolist()) & set(units.tolist())) for name, units in b.items()) / kept

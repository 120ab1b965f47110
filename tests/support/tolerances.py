"""What a backend may differ by from the float64 reference: one table for all backends.

Inputs are exact in float64 whatever their dtype, and every backend adds in float32 or wider, so the dtype of the
operands makes no difference to the error; the table is by dtype so that one entry can be looked up, and argued about,
for each. With `u = 2^-24` (6e-8, half a unit in the last place of float32):

* a term takes at most five roundings (the two products of `0.5·f·w·w`, their difference, the store);
* a chain of `n` float32 additions adds at most `n·u` of the sum of magnitudes, and about `sqrt(n)·u` in practice. The
  backends keep chains short: at most 32 before double takes over in the C++ kernels, and some tens of additions in a
  lane followed by trees on the GPU.

2e-6 is 33 of those `u`, four times the worst that was measured on a CPU: 2e-7 over random matrices and over units of
half a million weights, 5e-7 where all terms are equal and their roundings all point one way. An average term of a unit
of a quarter of a million is 4e-6 of its sum, so losing, doubling or misplacing a single one shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

TAYLOR = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}

# Fused scores and weights are computed in double and rounded once; scores are compared on the scale max(1, |score|).
FUSION = 1e-6

_FLOOR = 1e-30


def magnitude(weight: Tensor, grad: Tensor | None, fisher: Tensor | None, axis: int, order: str, group_size: int):
    """The scale of rounding errors, float64 `[units]`: a unit's sum of magnitudes of what is added.

    That is the fine sum itself for "first" and "second". The "mixed" term is a difference, so it is the sum of
    `|grad·weight| + ½·|fisher·weight²|`: where the two cancel, the fine sum is small and the rounding is not.
    """
    w = weight.double()
    total = torch.zeros_like(w)
    if order != "second":
        assert grad is not None
        total += (grad.double() * w).abs()
    if order != "first":
        assert fisher is not None
        total += (0.5 * fisher.double() * w * w).abs()
    if axis == 1:
        total = total.t()
    units = total.shape[0] // group_size
    return total.reshape(units, group_size * total.shape[1]).sum(1)


def error(out: Tensor, ref: Tensor, scale: Tensor) -> float:
    """max |out - ref| / scale; NaN or Inf in `out` counts as infinite."""
    assert out.shape == ref.shape == scale.shape
    if out.numel() == 0:
        return 0.0
    worst = ((out.double() - ref).abs() / scale.clamp(min=_FLOOR)).max().item()
    return worst if worst == worst else float("inf")


def assert_sums(fine: Tensor, signed: Tensor, reference: tuple[Tensor, Tensor], scale: Tensor, dtype) -> None:
    """Both vectors of `taylor_importance` within the table's entry for the weight's dtype."""
    for name, out, ref in (("fine", fine, reference[0]), ("signed", signed, reference[1])):
        assert out.dtype == torch.float32
        got = error(out, ref, scale)
        assert got <= TAYLOR[dtype], f"{name}: error {got:.2e} over {TAYLOR[dtype]:.0e} of the unit's magnitude"


def assert_fused(score: Tensor, weight: Tensor, reference: tuple[Tensor, Tensor]) -> None:
    for name, out, ref in (("score", score, reference[0]), ("weight", weight, reference[1])):
        assert out.dtype == torch.float32
        got = error(out, ref, ref.abs().clamp(min=1.0))
        assert got <= FUSION, f"{name}: error {got:.2e} over {FUSION:.0e}"

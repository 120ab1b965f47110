"""Second moments of activations, and systems of equations with them: what reconstruction and head residuals share."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import HywiaError
from ..ops.precision import full_float32

__all__ = [
    "TINY",
    "add_products",
    "added_to_diagonal",
    "cholesky_factor",
    "damped",
    "energy",
    "exact_products",
    "zero_moments",
]

TINY = 1e-30
# Rows that are multiplied in float32 before they are added in float64. On CUDA tensor cores sum them up, which cut off
# what they add: on an H200 up to 2e-6 of the norms' product after 512 rows, 4e-6 after 1,024, 1e-5 after 2,048. Refits
# do not tell 1e-5 from nothing; 512 rows take a fifth to a third longer than 1,024, and 2,048 a tenth to a sixth less.
_CPU_ROWS, _CUDA_ROWS = 1024, 1024
_PARTS = {torch.bfloat16: 1, torch.float16: 2}  # bfloat16 numbers that add up to one of these; float32: three


def zero_moments(rows: int, columns: int, device: torch.device) -> Tensor:
    """A sum that `add_products` can add to: float64 `[rows, columns]`."""
    return torch.zeros(rows, columns, dtype=torch.float64, device=device)


def add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += leftᵀ · right`, to 5e-6 of the product of the columns' norms, and where it is not on CUDA as exact as
    float32 products of all rows at once.

    On the CPU these are float32 products of some rows at a time. On CUDA they are made of products of bfloat16, which
    are exact in float32: a float32 number is the sum of three of them. Of the parts' products those are left out that
    are below float32's own rounding, so that a bfloat16 operand and a float32 one take three products, and two float32
    ones six; what is lost is lost in sums (`_CUDA_ROWS`). For float64 they are products in the operands' own dtype.

    Args:
        total: float64 `[a, b]` on the operands' device; see `zero_moments`.
        left: `[tokens, a]`. right: `[tokens, b]`. Any floating dtype.
    """
    on_cuda = left.device.type == "cuda" and torch.float64 not in (left.dtype, right.dtype)
    step = _CUDA_ROWS if on_cuda else _CPU_ROWS
    for begin in range(0, len(left), step):
        a, b = left[begin : begin + step], right[begin : begin + step]
        total += _of_parts(a, b) if on_cuda else _plain(a, b)


def _plain(left: Tensor, right: Tensor) -> Tensor:
    wide = torch.float64 if torch.float64 in (left.dtype, right.dtype) else torch.float32
    return left.to(wide).T @ right.to(wide)


def _of_parts(left: Tensor, right: Tensor) -> Tensor:
    """One product, whose rows are the parts' rows one after the other. The smallest come first: what a tensor core cuts
    off goes by the sum so far."""
    a, b = bfloat16_parts(left), bfloat16_parts(right)
    pairs = sorted((i + j, i, j) for i in range(len(a)) for j in range(len(b)) if i + j < 3)[::-1]
    stacked = torch.cat([a[i] for _, i, _ in pairs]), torch.cat([b[j] for _, _, j in pairs])
    return torch.mm(stacked[0].T, stacked[1], out_dtype=torch.float32)  # type: ignore[call-overload]


def bfloat16_parts(x: Tensor) -> list[Tensor]:
    """bfloat16 tensors, the largest first, that add up to `x`: exactly, but for numbers so small that a part of theirs
    underflows."""
    count, rest, parts = _PARTS.get(x.dtype, 3), x.float(), list[Tensor]()
    for number in range(count):
        parts.append(rest.bfloat16())
        if number + 1 < count:
            rest = rest - parts[-1].float()
    return parts


def energy(x: Tensor, weight: Tensor) -> Tensor:
    """`Σ_t weight_t · |x_t|²` as a float64 number. `x`: `[tokens, n]`, `weight`: `[tokens]`, both float32."""
    return (x.square().sum(1, dtype=torch.float64) * weight).sum()


def exact_products(*devices: torch.device) -> Any:
    """A context in which CUDA multiplies float32 matrices in full float32, if any device is CUDA's.

    Second moments of correlated inputs do not survive TF32's eleven bits.
    """
    return full_float32("cuda") if any(d.type == "cuda" for d in devices) else nullcontext()


def added_to_diagonal(gram: Tensor, ridge: float) -> Tensor:
    """`ridge · mean(diag)`, and a little that keeps moments of nothing but zeros definite."""
    return ridge * gram.diagonal().mean() + TINY


def damped(gram: Tensor, ridge: float) -> Tensor:
    """`gram + ridge · mean(diag) · 1`."""
    moments = gram.clone()
    moments.diagonal().add_(added_to_diagonal(gram, ridge))
    return moments


def cholesky_factor(gram: Tensor, ridge: float, what: str) -> Tensor:
    """Lower Cholesky factor of `damped`, float64 `[inputs, inputs]`; one wait for the device.

    Args:
        gram: float64 `[inputs, inputs]`, left as it is.
        ridge: share of the mean diagonal entry that is added to the diagonal.
        what: the name, in messages, of the matrix whose inputs' second moments these are.

    Raises:
        HywiaError: activations that are NaN or Inf, or moments that no positive ridge makes definite.
    """
    factor, failed = torch.linalg.cholesky_ex(damped(gram, ridge))
    # Not left to the factorisation: whether NaN fails in it depends on the library.
    finite, definite = torch.stack([torch.isfinite(gram).all(), failed == 0]).tolist()
    if not finite:
        raise HywiaError(
            f"{what}: expected finite activations, got NaN or Inf; load the model in float32 or bfloat16, and look for "
            "damaged weights"
        )
    if not definite:
        raise HywiaError(
            f"{what}: second moments of its inputs are singular; use a larger ridge or more calibration text"
        )
    return factor

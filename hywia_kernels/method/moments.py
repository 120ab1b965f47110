"""Second moments of activations, and systems of equations with them: what reconstruction and head residuals share."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import HywiaError
from ..ops.precision import full_float32

__all__ = ["TINY", "NormalEquations", "cholesky_factor", "exact_products", "moment_dtype"]

TINY = 1e-30


def moment_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which moments are added up: float64 on the CPU, float32 elsewhere, where float64 is too slow."""
    return torch.float64 if device.type == "cpu" else torch.float32


def exact_products(*devices: torch.device) -> Any:
    """A context in which CUDA multiplies float32 matrices in full float32, if any device is CUDA's.

    Second moments of correlated inputs do not survive TF32's eleven bits.
    """
    return full_float32("cuda") if any(d.type == "cuda" for d in devices) else nullcontext()


def cholesky_factor(gram: Tensor, ridge: float, what: str) -> Tensor:
    """Lower Cholesky factor of `gram + ridge · mean(diag) · 1`, float64 `[inputs, inputs]`; one wait for the device.

    Args:
        gram: float64 `[inputs, inputs]`, left as it is.
        ridge: share of the mean diagonal entry that is added to the diagonal.
        what: the name, in messages, of the matrix whose inputs' second moments these are.

    Raises:
        HywiaError: activations that are NaN or Inf, or moments that no positive ridge makes definite.
    """
    damped = gram.clone()
    damped.diagonal().add_(ridge * gram.diagonal().mean() + TINY)
    factor, failed = torch.linalg.cholesky_ex(damped)
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


class NormalEquations:
    """`Σ w·x xᵀ` and `Σ w·r xᵀ` of a weighted regression of residuals `r` on inputs `x`, added up chunk by chunk.

    float64 on the CPU, float32 products elsewhere; a matrix with a bias has a constant input at the end.
    """

    def __init__(self, name: str, inputs: int, outputs: int, device: torch.device) -> None:
        self.name = name
        self.dtype = moment_dtype(device)
        self.gram = torch.zeros(inputs, inputs, dtype=self.dtype, device=device)
        self.cross = torch.zeros(inputs, outputs, dtype=self.dtype, device=device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)
        self.target = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, residual: Tensor, target: Tensor, weight: Tensor) -> None:
        """`target`: weighted energy of what the matrix gives in the dense model, a float64 number."""
        x, residual, weight = x.to(self.dtype), residual.to(self.dtype), weight.to(self.dtype)[:, None]
        weighted = x * weight
        self.gram += weighted.T @ x
        self.cross += weighted.T @ residual
        self.energy += (residual.square() * weight).sum(dtype=torch.float64)
        self.target += target.to(self.target.device)

    def solve(self, ridge: float) -> tuple[Tensor, float, float]:
        """`(change of the weight [inputs, outputs], relative squared error before, and after)`, in float64.

        Raises:
            HywiaError: activations that are NaN or Inf, or equations without a solution.
        """
        gram, cross = self.gram.double(), self.cross.double()
        change = torch.cholesky_solve(cross, cholesky_factor(gram, ridge, self.name))
        after = self.energy - 2 * (change * cross).sum() + (change * (gram @ change)).sum()
        scale = self.target.clamp(min=TINY)
        return change, float(self.energy / scale), float(after / scale)

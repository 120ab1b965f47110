"""Second moments of activations, and systems of equations with them: what reconstruction and head residuals share."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import HywiaError
from ..ops.precision import full_float32

__all__ = ["TINY", "cholesky_factor", "exact_products", "moment_dtype"]

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

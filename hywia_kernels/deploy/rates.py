"""How fast a device multiplies, factors and copies: a measurement short enough to come before every run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..method.moments import add_products, zero_moments
from ..ops.precision import full_float32, multiplies_bfloat16

__all__ = ["H100", "Rates", "measured_rates"]

_SECONDS, _LEAST_ROUNDS = 0.03, 2  # of each measurement


@dataclass(frozen=True)
class Rates:
    """Attributes:
    products: FLOP/s of large matrix products in the model's dtype.
    moments: FLOP/s of second moments, of activations in the model's dtype (see `moments.add_products`).
    factors: FLOP/s of a float64 Cholesky factorisation and inverse, by `n³` for both.
    copies: bytes a second that are read, or written.
    launch: seconds from one decoder layer to the next where the device has nothing to do.
    narrow: FLOP/s of the same products in bfloat16, for a float32 model where the device is faster at these (see
        `multiplies_bfloat16`); None: training multiplies in the model's dtype.
    """

    products: float
    moments: float
    factors: float
    copies: float
    launch: float
    narrow: float | None = None


# An H100 SXM with bfloat16 weights.
H100 = Rates(products=780e12, moments=50e12, factors=2e12, copies=2.6e12, launch=0.7e-3)


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Of a CPU or CUDA device, by two products, a factorisation and a copy, repeated: 0.3 s where it is idle.

    A device that others use too shows the rates that are left.
    """
    cuda = device.type == "cuda"
    size, small = (4096, 2048) if cuda else (768, 512)
    with torch.no_grad(), full_float32(device.type):
        wide, own = torch.ones(size, size, device=device), torch.ones(size, size, dtype=dtype, device=device)
        total = zero_moments(size, size, device)
        moments = 2 * size**3 / _seconds(lambda: add_products(total, own, wide), device)
    with torch.no_grad():
        products = 2 * size**3 / _seconds(lambda: own @ own, device)
        narrow = None
        if dtype == torch.float32 and multiplies_bfloat16(device):
            half = own.to(torch.bfloat16)
            narrow = 2 * size**3 / _seconds(lambda: half @ half, device)
        definite = torch.eye(small, dtype=torch.float64, device=device)
        factors = small**3 / _seconds(lambda: torch.cholesky_inverse(torch.linalg.cholesky(definite)), device)
        piece = torch.ones((256 if cuda else 16) << 20, dtype=torch.uint8, device=device)
        other = torch.empty_like(piece)
        copies = 2 * piece.numel() / _seconds(lambda: other.copy_(piece), device)
    return Rates(products, moments, factors, copies, launch=H100.launch if cuda else 1e-3, narrow=narrow)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, the best of a few rounds."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    wait()
    # Calls on a GPU are queued together; on a CPU each is timed by itself, so that one that is not disturbed is seen.
    calls, best, done = (8 if device.type == "cuda" else 1), float("inf"), 0
    began = time.perf_counter()
    while done < _LEAST_ROUNDS or time.perf_counter() - began < _SECONDS:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        best = min(best, (time.perf_counter() - start) / calls)
        done += 1
    return best

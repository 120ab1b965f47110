"""Norm and gate by Triton: formulas for `recompute`, and whether they can be had."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.devices import on
from ..ops.registry import ENVIRONMENT, availability
from .recompute import Formula, Rerun

__all__ = ["Gate", "RmsNorm", "gate_formula", "kernels_module", "norm_formula", "power_of_two", "usable"]

_BLOCK = 1024


def usable(device: torch.device, backend: str | None) -> bool:
    """Triton is on, for tensors on a CUDA device, and no other backend but "cuda" was asked for."""
    asked = backend or os.environ.get(ENVIRONMENT) or None
    if device.type != "cuda" or asked not in (None, "cuda", "triton"):
        return False
    return _triton_is_on()


@cache
def _triton_is_on() -> bool:
    return next(state.on for state in availability() if state.name == "triton")


def kernels_module() -> Any:
    from . import kernels_triton

    return kernels_triton


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class RmsNorm:
    """`weight · x / rms(x)` over the last dimension; `weight` in `x`'s dtype."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self.kernels = kernels_module()
        self.columns = weight.numel()
        self.options = {"BLOCK": power_of_two(self.columns), "enable_fp_fusion": False}
        self.options["num_warps"] = min(max(self.options["BLOCK"] // 512, 1), 16)

    def _grid(self, x: Tensor) -> tuple[int]:
        return (x.numel() // self.columns,)

    def small(self, *xs: Tensor) -> tuple[Tensor, ...]:
        x = xs[0].contiguous()
        squares = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        with on(x.device):
            self.kernels.norm_squares[self._grid(x)](x, squares, self.columns, **self.options)
        return (torch.rsqrt(squares.mean(-1, keepdim=True) + self.eps),)

    def forward(self, *xs: Tensor) -> Tensor:
        x, scale = xs[0].contiguous(), xs[1]
        y = torch.empty_like(x)
        with on(x.device):
            self.kernels.norm_forward[self._grid(x)](x, scale, self.weight, y, self.columns, **self.options)
        return y

    def backward(self, dy: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        x, scale, dy = xs[0].contiguous(), xs[1], dy.contiguous()
        products = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x)
        with on(x.device):
            self.kernels.norm_products[self._grid(x)](dy, x, self.weight, products, self.columns, **self.options)
            along = products.sum(-1, keepdim=True)
            self.kernels.norm_backward[self._grid(x)](
                dy, x, scale, along, self.weight, dx, self.columns, 1.0 / self.columns, **self.options
            )
        return (dx,)


class Gate:
    """`silu(gate) · up`."""

    def __init__(self) -> None:
        self.kernels = kernels_module()

    def small(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return ()

    def forward(self, *xs: Tensor) -> Tensor:
        gate, up = (x.contiguous() for x in xs)
        y = torch.empty_like(gate)
        with on(y.device):
            self.kernels.gate_forward[(-(-y.numel() // _BLOCK),)](gate, up, y, y.numel(), BLOCK=_BLOCK, num_warps=4)
        return y

    def backward(self, dy: Tensor, *xs: Tensor) -> tuple[Tensor, ...]:
        gate, up = (x.contiguous() for x in xs)
        dy = dy.contiguous()
        dgate = torch.empty_like(gate)
        with on(dy.device):
            # The incoming gradient was made by the next linear layer for this product alone: dup takes its memory.
            self.kernels.gate_backward[(-(-dy.numel() // _BLOCK),)](
                dy, gate, up, dgate, dy, dy.numel(), BLOCK=_BLOCK, num_warps=4
            )
        return dgate, dy


def norm_formula(norm: Any, dtype: torch.dtype, fused: bool) -> Formula:
    """For a module that computes `weight · x / rms(x)` of `x` in `dtype`; its own forward where the kernel does not
    serve."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = getattr(norm, "weight", None)
    if not fused or eps is None or not isinstance(weight, Tensor) or getattr(norm, "bias", None) is not None:
        return Rerun(norm.forward)
    if weight.dim() == 1 and weight.dtype == dtype and weight.numel() <= 65536:
        return RmsNorm(weight.detach(), float(eps))
    return Rerun(norm.forward)


def gate_formula(activation: nn.Module, fused: bool) -> Formula:
    """For `activation(gate) · up`."""
    if fused and type(activation).__name__ in ("SiLU", "SiLUActivation"):
        return Gate()
    return Rerun(lambda gate, up: activation(gate) * up)

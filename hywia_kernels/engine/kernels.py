"""Norm and gate by Triton, as formulas for `recompute`, and whether Triton serves a device."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.registry import ENVIRONMENT, availability
from .launch import Launcher
from .recompute import Formula, Rerun

__all__ = ["Gate", "RmsNorm", "gate_formula", "kernels_module", "norm_formula", "power_of_two", "usable"]

_BLOCK = 1024


def usable(device: torch.device, backend: str | None) -> bool:
    """Whether Triton is on and serves this device, which must be CUDA's, and no other backend was asked for."""
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
    """`weight · x / rms(x)` over the last dimension, with `weight` in the dtype of `x`; the mean of `x²` is kept."""

    def __init__(self, weight: Tensor, eps: float, exact: bool = True) -> None:
        self.weight, self.eps, self.columns = weight, eps, weight.numel()
        block = power_of_two(self.columns)
        self.launch = norm_launchers(block, exact, min(max(block // 512, 1), 16))

    def _programs(self, x: Tensor) -> tuple[int, int]:
        return x.numel() // self.columns, 1

    def small(self, *xs: Tensor) -> tuple[Tensor, ...]:
        x = xs[0].contiguous()
        squares = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        self.launch["squares"](x.device, self._programs(x), x, squares, self.columns)
        return (squares.mean(-1, keepdim=True),)

    def forward(self, *xs: Tensor) -> Tensor:
        x, mean = xs[0].contiguous(), xs[1]
        y = torch.empty_like(x)
        self.launch["forward"](x.device, self._programs(x), x, mean, self.weight, y, self.columns, self.eps)
        return y

    def backward(self, dy: Tensor, *xs: Tensor, private: bool = False) -> tuple[Tensor, ...]:
        x, mean, dy = xs[0].contiguous(), xs[1], dy.contiguous()
        products = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x)
        operands = (x.device, self._programs(x), dy, x)
        self.launch["products"](*operands, self.weight, products, self.columns)
        along, share = products.sum(-1, keepdim=True), 1.0 / self.columns
        self.launch["backward"](*operands, mean, along, self.weight, dx, self.columns, self.eps, share)
        return (dx,)


@cache
def norm_launchers(block: int, exact: bool, warps: int) -> dict[str, Launcher]:
    kernels, options = kernels_module(), {"num_warps": warps, "enable_fp_fusion": False}
    plain, careful = {"BLOCK": block}, {"BLOCK": block, "EXACT": exact}
    return {
        "squares": Launcher(kernels.norm_squares, plain, **options),
        "forward": Launcher(kernels.norm_forward, careful, **options),
        "products": Launcher(kernels.norm_products, plain, **options),
        "backward": Launcher(kernels.norm_backward, careful, **options),
    }


class Gate:
    """`silu(gate) · up`."""

    def __init__(self, exact: bool = True) -> None:
        self.launch = gate_launchers(exact)

    def small(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return ()

    def forward(self, *xs: Tensor) -> Tensor:
        gate, up = (x.contiguous() for x in xs)
        y = torch.empty_like(gate)
        count = y.numel()
        self.launch["forward"](y.device, (-(-count // _BLOCK), 1), gate, up, y, count)
        return y

    def backward(self, dy: Tensor, *xs: Tensor, private: bool = False) -> tuple[Tensor, ...]:
        gate, up = (x.contiguous() for x in xs)
        dy = dy.contiguous()
        dgate, count = torch.empty_like(gate), dy.numel()
        dup = dy if private else torch.empty_like(dy)
        self.launch["backward"](dy.device, (-(-count // _BLOCK), 1), dy, gate, up, dgate, dup, count)
        return dgate, dup


@cache
def gate_launchers(exact: bool) -> dict[str, Launcher]:
    kernels, options = kernels_module(), {"num_warps": 4, "enable_fp_fusion": False}
    constants = {"BLOCK": _BLOCK, "EXACT": exact}
    return {
        "forward": Launcher(kernels.gate_forward, constants, **options),
        "backward": Launcher(kernels.gate_backward, constants, **options),
    }


def _exact() -> bool:
    """Whether kernels can call CUDA's own functions, which Triton's interpreter lacks."""
    return os.environ.get("TRITON_INTERPRET") != "1"


def norm_formula(norm: Any, dtype: torch.dtype, fused: bool) -> Formula:
    """The formula of a norm: the kernel where `fused` and the module is an RMS norm with a weight in `dtype`, else the
    module's own forward."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = getattr(norm, "weight", None)
    if not fused or eps is None or not isinstance(weight, Tensor) or getattr(norm, "bias", None) is not None:
        return Rerun(norm.forward)
    if weight.dim() == 1 and weight.dtype == dtype and weight.numel() <= 65536:
        return RmsNorm(weight.detach(), float(eps), _exact())
    return Rerun(norm.forward)


def gate_formula(activation: nn.Module, fused: bool) -> Formula:
    """The formula of `activation(gate) · up`: the kernel where `fused` and the activation is SiLU, else torch."""
    if fused and type(activation).__name__ in ("SiLU", "SiLUActivation"):
        return Gate(_exact())
    return Rerun(lambda gate, up: activation(gate) * up)

"""Rotary embedding of queries and keys in one launch instead of about twelve, while a model is measured on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import arch
from .kernels import kernels_module, power_of_two, usable
from .launch import Launcher

__all__ = ["rotary_replaced", "rotated"]

_HEADS = 8  # of one step of a program


@cache
def _launcher(backward: bool, half: int) -> Launcher:
    constants = {"BACKWARD": backward, "HEADS": _HEADS, "HALF": half}
    # Fused, a product would go into the sum without the rounding that comes between them.
    return Launcher(kernels_module().rotary, constants, num_warps=4, enable_fp_fusion=False)


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """Queries and keys `[batch, heads, tokens, head_dim]`, as views of `[batch, tokens, heads, head_dim]`."""
    q, k = (x.transpose(1, 2).contiguous() for x in (q, k))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    half, rows = q.shape[-1] // 2, cos.shape[0] * cos.shape[1]
    _launcher(backward, power_of_two(half))(
        q.device, (q.shape[0] * q.shape[1], 2), q, k, q_out, k_out, cos, sin, rows, q.shape[2], k.shape[2], half
    )
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _launch(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_launch(grads[0], grads[1], cos, sin, True), None, None


def rotated(original: Callable) -> Callable:
    """`original`, by the kernel where the operands are what it serves: whole heads rotated, all in one dtype."""

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, **others: Any) -> Any:
        width, tokens = q.shape[-1], q.shape[2]
        tables = (q.shape[0], tokens, width), (1, tokens, width)
        served = tuple(cos.shape) in tables and cos.shape == sin.shape and width % 2 == 0 and k.shape[-1] == width
        served = served and all(x.dtype == q.dtype and x.device == q.device for x in (k, cos, sin))
        if others or unsqueeze_dim != 1 or not served or k.shape[2] != tokens:
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, **others)
        return _Rotary.apply(q, k, cos.contiguous(), sin.contiguous())

    return apply


@contextmanager
def rotary_replaced(model: Any, backend: str | None) -> Iterator[None]:
    """The function by which the model's attention modules rotate, replaced for a while where Triton serves.

    It is a global of the Python module that defines the attention, so other models of the family see it meanwhile; it
    computes what the original does.
    """
    entry = arch.architecture(model)
    layer = model.get_submodule(entry.layers)[0]
    query = layer.get_submodule(entry.attention.query)
    attention = layer.get_submodule(entry.attention.query.rpartition(".")[0])
    names = getattr(type(attention).forward, "__globals__", {})
    original = names.get(entry.attention.rotary)
    if original is None or not usable(query.weight.device, backend):
        yield
        return
    try:
        names[entry.attention.rotary] = rotated(original)
        yield
    finally:
        names[entry.attention.rotary] = original

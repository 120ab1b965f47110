"""Rotary embedding of queries and keys in one launch instead of about twelve, while a model is measured on CUDA."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import arch
from ..ops.switch import Held, Switch
from .kernels import kernels_module, power_of_two, usable
from .launch import Launcher

__all__ = ["REPLACED", "rotary_replaced", "rotate", "rotated", "tables_serve"]

_HEADS = 8  # that a program rotates in one step


@cache
def _launcher(backward: bool, half: int) -> Launcher:
    constants = {"BACKWARD": backward, "HEADS": _HEADS, "HALF": half}
    # Fused, a product would go into the sum without the rounding that comes between them.
    return Launcher(kernels_module().rotary, constants, num_warps=4, enable_fp_fusion=False)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys `[batch, tokens, heads, head_dim]`, or with `backward` their gradients.

    The tables are `[batch or 1, tokens, head_dim]`, contiguous, of the queries' dtype.
    """
    q, k = q.contiguous(), k.contiguous()
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    half, rows = q.shape[-1] // 2, cos.shape[0] * cos.shape[1]
    _launcher(backward, power_of_two(half))(
        q.device, (q.shape[0] * q.shape[1], 2), q, k, q_out, k_out, cos, sin, rows, q.shape[2], k.shape[2], half
    )
    return q_out, k_out


def tables_serve(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> bool:
    """Whether the kernel can rotate `x` `[batch, tokens, ...]` by these tables: whole heads, one dtype, one device."""
    shape = (x.shape[1], head_dim)
    fitting = cos.shape == sin.shape and cos.shape[1:] == shape and cos.shape[0] in (1, x.shape[0])
    return fitting and head_dim % 2 == 0 and all(t.dtype == x.dtype and t.device == x.device for t in (cos, sin))


def _rotated_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """`rotate` for tensors `[batch, heads, tokens, head_dim]`."""
    q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin, backward)
    return q.transpose(1, 2), k.transpose(1, 2)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated_heads(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_rotated_heads(grads[0], grads[1], cos, sin, True), None, None


def rotated(original: Callable) -> Callable:
    """A rotation that calls the kernel where it serves the operands, which must have one dtype, and else `original`."""

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, **others: Any) -> Any:
        served = tables_serve(q.transpose(1, 2), cos, sin, q.shape[-1]) and k.shape[2:] == q.shape[2:]
        if others or unsqueeze_dim != 1 or not served or k.dtype != q.dtype or k.device != q.device:
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, **others)
        return _Rotary.apply(q, k, cos.contiguous(), sin.contiguous())

    return apply


class _Replaced:
    """The rotations that may be replaced, each by a switch of its own; itself used like one switch."""

    def __init__(self) -> None:
        self._switches: dict[tuple[int, str], Switch] = {}

    def held(self, names: dict[str, Any], name: str) -> Held:
        """A context in which `names[name]`, in the globals of a Python module, is replaced."""

        def restore(original: Callable) -> None:
            names[name] = original

        key = id(names), name
        if key not in self._switches:
            self._switches[key] = Switch(
                lambda: names[name], lambda: names.__setitem__(name, rotated(names[name])), restore
            )
        return self._switches[key].held()

    def holders(self) -> frozenset[int]:
        return frozenset().union(*(switch.holders() for switch in self._switches.values()))

    def settle(self, holders: frozenset[int]) -> None:
        for switch in self._switches.values():
            switch.settle(holders)


REPLACED = _Replaced()


@contextmanager
def rotary_replaced(model: Any, backend: str | None) -> Iterator[bool]:
    """Replaces, where Triton serves, the function by which the model's attention modules rotate; yields whether it did.

    The function is a global of the Python module that defines the attention, so other models of the family call the
    replacement meanwhile. It computes what the original does.
    """
    entry = arch.architecture(model)
    if not entry.attention.rotary:
        yield False
        return
    layer = model.get_submodule(entry.layers)[0]
    query = layer.get_submodule(entry.attention.query)
    attention = layer.get_submodule(entry.attention.module)
    # The function that was written, inside whatever decorates it: its globals are where it looks names up.
    names = getattr(inspect.unwrap(type(attention).forward), "__globals__", {})
    if entry.attention.rotary not in names or not usable(query.weight.device, backend):
        yield False
        return
    with REPLACED.held(names, entry.attention.rotary):
        yield True

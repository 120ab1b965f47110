"""Cheap functions whose outputs are not kept for backward: they are computed again from what they came from.

A `Formula` computes `y = f(xs)` and its gradients. `apply` runs it, keeps `xs` alone, and tags `y` with a `Recipe`, so
that a scored linear layer that is given `y` keeps the recipe instead of `y`. Recomputed values equal the first ones bit
for bit, since the same code makes them from the same operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Formula", "Recipe", "Rerun", "apply", "recipe"]

_TAG = "_hywia_recipe"


class Formula(Protocol):
    """A function `y = f(xs)` and its gradients.

    `small` computes intermediate values that spare work in the other two and take next to no memory, such as a norm's
    mean of squares. They are kept, and passed to `forward` and `backward` after the operands. `private` says that
    nobody else holds `dy`, so that its memory may be overwritten; what autograd brings may be held by a hook, or as a
    gradient.
    """

    def small(self, *xs: Tensor) -> tuple[Tensor, ...]: ...

    def forward(self, *xs: Tensor) -> Tensor: ...

    def backward(self, dy: Tensor, *xs: Tensor, private: bool = False) -> tuple[Tensor, ...]: ...


class Rerun:
    """A module's own forward; backward runs it again and asks autograd. Serves any function, on any device."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def small(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return ()

    def forward(self, *xs: Tensor) -> Tensor:
        with torch.no_grad():
            return self.function(*xs)

    def backward(self, dy: Tensor, *xs: Tensor, private: bool = False) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in xs]
        with torch.enable_grad():
            y = self.function(*leaves)
        return torch.autograd.grad(y, leaves, dy)


class Recipe:
    """How to compute one tensor again, for the linear layers that need it.

    Each of them calls `reserve` once in forward and `take` once in backward; the last `take` frees value and sources.
    """

    def __init__(self, formula: Formula, sources: tuple[Tensor, ...]) -> None:
        self._formula, self._sources = formula, sources
        self._value: Tensor | None = None
        self._uses = 0

    def reserve(self) -> Recipe:
        self._uses += 1
        return self

    def take(self) -> Tensor:
        value = self._formula.forward(*self._sources) if self._value is None else self._value
        self._uses -= 1
        self._value = value if self._uses else None
        if not self._uses:
            self._sources = ()
        return value


class _Applied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: Formula, *xs: Tensor) -> Tensor:
        ctx.formula = formula
        ctx.save_for_backward(*xs)
        return formula.forward(*xs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made = ctx.formula.backward(grads[0], *ctx.saved_tensors)
        return None, *made, *(None for _ in ctx.saved_tensors[len(made) :])


def apply(formula: Formula, *xs: Tensor) -> Tensor:
    """Returns `formula` of `xs`, differentiable; of the operands and the result only `xs` are kept for backward."""
    with torch.no_grad():
        xs = (*xs, *formula.small(*xs))
    y = _Applied.apply(formula, *xs)
    if y.requires_grad:
        setattr(y, _TAG, Recipe(formula, tuple(x.detach() for x in xs)))
    return y


def recipe(tensor: Tensor) -> Recipe | None:
    """The recipe of a tensor that `apply` made, reserved for one `take`; None for any other tensor."""
    tagged = getattr(tensor, _TAG, None)
    return None if tagged is None else tagged.reserve()

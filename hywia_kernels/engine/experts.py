"""Experts and routers while their matrices are scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .. import arch
from ..types import Group

__all__ = ["experts_forward", "gated", "router_forward", "whole_experts"]

# `(inputs, weight, offsets of the samples among the inputs' rows)` to outputs.
Scored = Callable[[Tensor, Tensor, Tensor], Tensor]


def gated(module: Any, made: Sequence[Tensor]) -> Tensor:
    """An expert's channels of what its matrices of rows give: by the module's own `_apply_gate` where it has one, and
    else `act_fn(gate) · up`; without a gate, `act_fn` of it."""
    if len(made) > 1:
        return module.act_fn(made[0]) * made[1]
    if not getattr(module, "has_gate", True):
        return module.act_fn(made[0])
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(made[0])
    gate, up = made[0].chunk(2, dim=-1)
    return module.act_fn(gate) * up


def experts_forward(
    module: Any, names: arch.Experts, scored: Mapping[tuple[str, int], Scored], samples: int
) -> Callable:
    """`forward` of stacked experts: expert by expert, with each one's tokens in the samples' order.

    Args:
        module: computes, for an expert's tokens, `columns[0](act_fn(gate) · up)`, gate and up being `rows`; where it
            has an `_apply_gate` of its own, that of what `rows` give, and where it has no gate, `act_fn` of it.
        names: of the module's parameters.
        scored: `(parameter, expert)` -> the function that computes the product with that matrix and scores it.
        samples: how many samples the rows are of; with their padding they are equally long.
    """
    rows, columns = tuple(dict.fromkeys(names.rows)), names.columns[0]

    def product(name: str, expert: int, states: Tensor, offsets: Tensor) -> Tensor:
        out = scored[name, expert](states, getattr(module, name)[expert], offsets)
        return out + getattr(module, f"{name}_bias")[expert] if names.biased else out

    def forward(hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        boundaries = torch.arange(samples + 1, device=hidden.device) * (len(hidden) // samples)
        for expert in range(getattr(module, columns).shape[0]):
            token, rank = (chosen == expert).nonzero(as_tuple=True)  # by token, so by sample
            if not len(token):
                continue
            offsets = torch.searchsorted(token, boundaries)
            states = hidden[token]
            made = [product(name, expert, states, offsets) for name in rows]
            out = product(columns, expert, gated(module, made), offsets)
            out = out * shares[token, rank, None]
            total.index_add_(0, token, out.to(total.dtype))
        return total

    return forward


class _Intercept(TorchFunctionMode):
    """A mode in which `scored` computes the products with one weight."""

    def __init__(self, weight: Tensor, scored: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.scored = weight, scored

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is functional.linear and args[1] is self.weight:
            return self.scored(args[0])
        return function(*args, **(kwargs or {}))


def router_forward(router: nn.Module, scored: Callable[[Tensor], Tensor]) -> Callable:
    """`forward` of a router in which `scored` computes the product with its weight."""
    original = router.forward
    weight: Any = router.weight

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Intercept(weight, scored):
            return original(*args, **kwargs)

    return forward


def whole_experts(fine: Mapping[str, Tensor], coarse: Mapping[str, Tensor], groups: Sequence[Group]) -> None:
    """Adds to the scores of whole experts those of their channels, which together make up an expert's matrices.

    Args:
        fine, coarse: of each group by its name, as `Results` has them.
    """
    for group in groups:
        if group.kind != "experts":
            continue
        channels = [g for g in groups if g.tied_width and g.layer == group.layer]
        for e, expert in enumerate(channels):
            fine[group.name][:, e] += fine[expert.name].sum(1)
            for m, member in enumerate(group.members):
                parts = [i for i, of in enumerate(expert.members) if of.parameter == member.parameter]
                if member.module == expert.members[0].module and parts:
                    coarse[group.name][m, :, e] = coarse[expert.name][parts].sum((0, 2))

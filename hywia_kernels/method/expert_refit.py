"""Equations of stacked experts' output matrices, each from the tokens that are sent to it.

An expert's channels leave through its own matrix, and only for its tokens: what the channels that go gave there is
regressed on those that stay, by the states that reach the expert in the pruned and so far refitted model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import arch
from ..engine.experts import gated
from ..engine.patches import forward_replaced
from ..types import Group
from .equations import NormalEquations
from .layer_targets import LayerTarget, Run

__all__ = ["Sent", "add_tokens", "sent"]


@dataclass
class Sent:
    """What enters a layer's experts for one run of samples.

    Attributes:
        hidden: `[tokens, features]`. chosen: int64 `[tokens, experts per token]`. shares: of these, as `chosen`.
        weight: float32 `[tokens]`, of a token's squared error; zero where it is padding.
    """

    hidden: Tensor
    chosen: Tensor
    shares: Tensor
    weight: Tensor


def sent(layer: nn.Module, index: int, experts: nn.Module, run: Run, goal: LayerTarget) -> Sent:
    """What the pruned model sends to the experts of a layer; the layer runs without them."""
    entered: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(hidden: Tensor, chosen: Tensor, shares: Tensor, *_: Any, **__: Any) -> Tensor:
        entered.append((hidden, chosen, shares))
        return torch.zeros_like(hidden)

    with forward_replaced([(experts, keep)]):
        run.calls[index](layer, run.pruned)
    weight = goal.weight
    if run.rows is not None:
        weight = weight.new_zeros(len(entered[0][0])).index_copy_(0, run.rows.to(weight.device), weight)
    return Sent(*entered[0], weight)


def add_tokens(
    normal: NormalEquations,
    module: Any,
    names: arch.Experts,
    group: Group,
    kept: Tensor,
    originals: Mapping[int, Tensor],
    runs: Sequence[Sent],
) -> int:
    """Add an expert's tokens to its equations.

    Args:
        module: the experts. group: of this one's channels. kept: those that stay, int64.
        originals: parameters of the module, by `id`, as they were before the others' rows became zero.

    Returns:
        how many tokens reach the expert.
    """

    def original(name: str) -> Tensor:
        parameter = getattr(module, name)
        return originals.get(id(parameter), parameter)[expert]

    member = group.members[-1]
    expert = member.index or 0
    down = original(member.parameter)
    down = down if member.axis == 1 else down.T
    reached = 0
    for run in runs:
        token, rank = (run.chosen == expert).nonzero(as_tuple=True)
        weight = run.weight[token] * run.shares[token, rank].float().square()
        token, weight = token[weight > 0], weight[weight > 0]
        if not len(token):
            continue
        states, made = run.hidden[token], []
        for name in dict.fromkeys(names.rows):
            matrix = original(name)
            bias = original(f"{name}_bias") if names.biased else None
            made.append(functional.linear(states, matrix.T if names.transposed else matrix, bias))
        active = gated(module, made)
        whole = functional.linear(active, down).float()
        inputs = active.index_select(1, kept)
        missing = whole - functional.linear(inputs, down.index_select(1, kept)).float()
        normal.add(inputs, missing, (whole.square() * weight[:, None]).sum(dtype=torch.float64), weight)
        reached += len(token)
    return reached

"""Masked channels that are not computed: a gated or plain MLP runs at its cut width while its layer is masked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..types import Group

__all__ = ["narrowed"]


def narrowed(model: nn.Module, groups: Sequence[Group], keep: Mapping[str, Tensor]) -> list[tuple[nn.Module, Any]]:
    """Replacements for `patches.forward_replaced` by which MLPs compute the channels that stay, and no others.

    Channels whose rows and columns are zeroed add nothing, so what leaves the MLP is the same but for rounding. Groups
    whose matrices are not a linear layer each, or with entries per channel of anything else, are left as they are, and
    so are modules whose `forward` somebody has replaced.
    """
    replacements: list[tuple[nn.Module, Any]] = []
    for group in groups:
        kept = keep[group.name]
        modules: list[Any] = [model.get_submodule(member.module) for member in group.members]
        if group.kind != "mlp" or kept.numel() == group.units or not all(map(_plain, modules)):
            continue
        whole = all(
            member.index is None and member.group_size == 1 and module.weight.shape[member.axis] == group.units
            for member, module in zip(group.members, modules, strict=True)
        )
        own = {member.module for member in group.members}
        if whole and all(vector.module in own for vector in group.vectors):
            for member, module in zip(group.members, modules, strict=True):
                replacements.append((module, _of_kept(module, member.axis, kept.to(module.weight.device))))
    return replacements


def _plain(module: Any) -> bool:
    return type(module) is nn.Linear and "forward" not in vars(module)


def _of_kept(linear: Any, axis: int, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """The layer's kept outputs (axis 0), or its outputs from the kept inputs, with the weights as they are then."""

    def forward(inputs: Tensor) -> Tensor:
        bias = linear.bias
        if axis == 0 and bias is not None:
            bias = bias.index_select(0, kept)
        return functional.linear(inputs, linear.weight.index_select(axis, kept), bias)

    return forward

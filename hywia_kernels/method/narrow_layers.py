"""Masked channels that are not computed: a gated or plain MLP runs at its cut width while its layer is masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..types import Group

__all__ = ["Narrow", "narrowed"]


@dataclass(frozen=True)
class Narrow:
    """A linear layer that runs at its cut width: of its outputs (axis 0) or its inputs, those that stay."""

    module: Any
    axis: int
    kept: Tensor  # int64, on the weight's device

    def of(self, name: str, parameter: Tensor) -> Tensor:
        """What is used of the layer's parameter of this name; all of one that is narrow already."""
        axis = self.axis if name == "weight" else 0
        if (name == "bias" and self.axis == 1) or parameter.shape[axis] == self.kept.numel():
            return parameter
        return parameter.index_select(axis, self.kept)

    def put(self, name: str, parameter: Tensor, values: Tensor) -> None:
        """Write what is used of a parameter, in place."""
        if values.shape == parameter.shape:
            parameter.copy_(values)
        else:
            parameter.index_copy_(self.axis if name == "weight" else 0, self.kept, values.to(parameter.dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        """The module's, with the weights as they are then."""
        bias = self.module.bias
        return functional.linear(
            inputs, self.of("weight", self.module.weight), None if bias is None else self.of("bias", bias)
        )


def narrowed(model: nn.Module, groups: Sequence[Group], keep: Mapping[str, Tensor]) -> list[Narrow]:
    """The linear layers of MLPs that can run at their cut width, to compute the channels that stay and no others.

    Channels whose rows and columns are zeroed add nothing, so what leaves the MLP is the same but for rounding. Groups
    whose matrices are not a linear layer each, or with entries per channel of anything else, are left as they are, and
    so are modules whose `forward` somebody has replaced.
    """
    found: list[Narrow] = []
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
            found += [
                Narrow(module, member.axis, kept.to(module.weight.device))
                for member, module in zip(group.members, modules, strict=True)
            ]
    return found


def _plain(module: Any) -> bool:
    return type(module) is nn.Linear and "forward" not in vars(module)

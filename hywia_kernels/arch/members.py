"""Members of groups: the rows or columns of a layer's matrices that its units are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import HywiaError
from ..types import Member
from .views import Modules, is_linear, is_transposed, parameter_of

__all__ = ["linear_of", "on_inputs", "on_outputs", "unit_parameters", "vector_of"]


def linear_of(modules: Modules, name: str) -> Any:
    """The linear layer of that name.

    Raises:
        HywiaError: there is none, or it is something else.
    """
    module = modules.get(name)
    if module is None:
        raise HywiaError(f"model: expected a module {name!r}, found none; its structure is not the table's")
    if not is_linear(module):
        raise HywiaError(
            f"{name}: expected torch.nn.Linear or transformers' Conv1D, got {type(module).__name__}; "
            "load the model without quantisation or adapters"
        )
    return module


def on_outputs(modules: Modules, name: str, group_size: int, start: int = 0) -> Member:
    """Units on a linear layer's outputs, with their biases."""
    module = linear_of(modules, name)
    bias = None if parameter_of(module, "bias") is None else "bias"
    return Member(name, 1 if is_transposed(module) else 0, group_size, start, bias=bias)


def on_inputs(modules: Modules, name: str, group_size: int) -> Member:
    """Units on a linear layer's inputs."""
    return Member(name, 0 if is_transposed(linear_of(modules, name)) else 1, group_size)


def unit_parameters(modules: Modules, members: Sequence[Member], vectors: Sequence[Member] = ()) -> int:
    """Parameters that leave with one unit."""
    total = sum(vector.group_size for vector in vectors)
    for member in members:
        shape = list(parameter_of(modules[member.module], member.parameter).shape)
        if member.index is not None:
            del shape[0]
        del shape[member.axis]
        total += member.group_size * (math.prod(shape) + (member.bias is not None))
    return total


def vector_of(modules: Modules, name: str, units: int) -> Member:
    """A vector with as many entries for each unit."""
    module, _, parameter = name.rpartition(".")
    found = getattr(modules.get(module), parameter, None)
    if not isinstance(found, nn.Parameter) or found.dim() != 1 or found.numel() % units:
        raise HywiaError(f"{name}: expected a vector with as many entries for each of {units} units")
    return Member(module, 0, found.numel() // units, parameter=parameter)

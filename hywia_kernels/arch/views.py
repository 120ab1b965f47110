"""The matrices that a model's units lie on, and the part of each that a group's units are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..types import Group, Member

__all__ = ["Matrix", "Modules", "is_linear", "is_transposed", "linears", "matrices", "parameter_of", "sizes_of", "view"]

Modules = Mapping[str, nn.Module]


def parameter_of(module: nn.Module, name: str) -> Any:
    """Past the modules' own attribute lookup, which takes ten times as long."""
    return module._parameters[name]


def is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer that stores `[in, out]`."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer with its weight as it is: torch's, a family's own subclass of it, or Conv1D."""
    own = isinstance(module, nn.Linear) and type(module).__module__.startswith("transformers.models.")
    return type(module) is nn.Linear or own or is_transposed(module)


def sizes_of(module: Any) -> tuple[int, int]:
    """`(outputs, inputs)` of a linear layer."""
    out, into = parameter_of(module, "weight").shape
    return (into, out) if is_transposed(module) else (out, into)


def view(model: nn.Module | Modules, member: Member, units: int) -> Tensor:
    """The rows or columns of a member's parameter that its `units` units are: a matrix (or vector) that shares its
    memory, units along `member.axis` in runs of `group_size`."""
    module: Any = model.get_submodule(member.module) if isinstance(model, nn.Module) else model[member.module]
    whole = parameter_of(module, member.parameter)
    if member.index is not None:
        whole = whole[member.index]
    elif whole.dim() > 2:
        whole = whole.flatten(1)
    size = units * member.group_size
    return whole if size == whole.shape[member.axis] else whole.narrow(member.axis, member.start, size)


@dataclass(frozen=True)
class Matrix:
    """One matrix of a model and the units that lie on it.

    Attributes:
        module, parameter, index: as in `Member`.
        transposed: stored `[in, out]`.
        members: `(group, index of its member)` of each group of units on it.
    """

    module: str
    parameter: str
    index: int | None
    transposed: bool
    members: tuple[tuple[Group, int], ...]


def matrices(model: nn.Module | Modules, found: Sequence[Group]) -> list[Matrix]:
    """The matrices that groups are about, each once, in the groups' order; of a model, or of its modules by name.

    Stacks of whole experts are left out: their matrices are there with the experts' channels.
    """
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else model
    members: dict[tuple[str, str, int | None], list[tuple[Group, int]]] = {}
    for group in found:
        for i, member in enumerate(group.members):
            if member.index is None and parameter_of(modules[member.module], member.parameter).dim() > 2:
                continue
            members.setdefault((member.module, member.parameter, member.index), []).append((group, i))
    return [Matrix(*key, _stored_transposed(modules[key[0]], key[2], on), tuple(on)) for key, on in members.items()]


def _stored_transposed(module: nn.Module, index: int | None, on: Sequence[tuple[Group, int]]) -> bool:
    """Whether a matrix is stored `[in, out]`: of a stack, units enter the last matrix of a group by its inputs."""
    if index is None:
        return is_transposed(module)
    group, i = on[0]
    inputs = i == len(group.members) - 1
    return (group.members[i].axis == 0) == inputs


def linears(model: nn.Module | Modules, found: Sequence[Group]) -> dict[str, Any]:
    """The modules that hold groups' matrices, by name; of a model, or of its modules by name."""
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else model
    return {m.module: modules[m.module] for g in found for m in g.members}

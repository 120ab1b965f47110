"""A model's parameters and its modules' attributes, put back when a change of them fails halfway."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Removed", "Undo", "complement"]


def complement(size: int, kept: Tensor) -> Tensor:
    """Indices below `size` that are not among `kept`, int64, ascending."""
    gone = torch.ones(size, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero()[:, 0]


class Removed:
    """What a cut took from a parameter; what stays and this together take the memory of the parameter.

    Args:
        before: the parameter as it was. axis: the axis that was cut. kept: entries that stay, int64, ascending.
        of: which of the matrices stacked in the parameter was cut; None: the parameter is one matrix or vector, and
            dimensions beyond two count as columns.
        place: of what stays of that matrix in the stack after the cut; None where nothing of it stays.
    """

    def __init__(
        self, before: Tensor, axis: int, kept: Tensor, of: int | None = None, place: int | None = None
    ) -> None:
        part = self._part(before, of)
        self.axis, self.kept, self.of, self.place = axis, kept, of, place
        self.gone = complement(part.shape[axis], kept)
        self.values = part.index_select(axis, self.gone.to(part.device))

    @staticmethod
    def _part(whole: Tensor, of: int | None) -> Tensor:
        part = whole if of is None else whole[of]
        return part.flatten(1) if part.dim() > 2 else part

    def fill(self, whole: Tensor, stays: Tensor) -> None:
        """Fill `whole`, of the shape before the cut, from `stays`, of the shape after it, and the removed values."""
        part = self._part(whole, self.of)
        part.index_copy_(self.axis, self.gone.to(part.device), self.values.to(part.device))
        if self.kept.numel():
            values = self._part(stays, self.place)
            part.index_copy_(self.axis, self.kept.to(part.device), values.to(part.device))


class Undo:
    """Parameters that are replaced, and attributes that are set, in the course of one change.

    A parameter that something else holds stays alive, and comes back itself. The memory of one that nothing else holds
    is released as soon as it is replaced, and what a cut took from it is enough to make an equal one.
    """

    def __init__(self, model: nn.Module) -> None:
        configs = {id(c): c for m in model.modules() for c in _configs(vars(m).get("config"))}
        owners = [*model.modules(), *configs.values()]
        # The dictionaries that modules keep hooks and submodules in are copied as well: these change in place.
        self._attributes = [(vars(owner), _copied(vars(owner))) for owner in owners]
        self._replaced: list[tuple[nn.Module, str, Callable[[], Tensor]]] = []

    def replace(self, module: nn.Module, leaf: str, new: Tensor, removed: Sequence[Removed] | None) -> None:
        """Give a module another parameter.

        Args:
            module, leaf: the module, and the parameter's name in it. new: the values.
            removed: what the new parameter lacks of the old one; None: the old one is held until the end.
        """
        old = module._parameters[leaf]
        assert old is not None
        parameter = nn.Parameter(new, requires_grad=old.requires_grad)
        restore = (lambda: old) if removed is None else _remade(old, parameter, removed)
        self._replaced.append((module, leaf, restore))
        setattr(module, leaf, parameter)

    def roll_back(self) -> None:
        """Put every parameter and attribute back; after an interrupt it may be called again."""
        while self._replaced:
            module, leaf, restore = self._replaced[-1]
            module._parameters[leaf] = restore()  # type: ignore[assignment]
            self._replaced.pop()
        for attributes, before in self._attributes:
            for name in [name for name in attributes if name not in before]:
                del attributes[name]
            for name, value in before.items():
                attributes[name] = value.restored() if isinstance(value, _Contents) else value


def _configs(config: Any) -> list[Any]:
    """A config and the configs that it holds."""
    if config is None or not hasattr(config, "__dict__"):
        return []
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "__dict__")]
    return [config, *inner]


class _Contents:
    """The contents of a dictionary or list, to be put back into the same object."""

    def __init__(self, of: Any) -> None:
        self.of, self.held = of, of.copy()

    def restored(self) -> Any:
        self.of.clear()
        (self.of.update if hasattr(self.of, "update") else self.of.extend)(self.held)
        return self.of


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value if name == "_parameters" or not isinstance(value, (dict, list)) else _Contents(value)
        for name, value in attributes.items()
    }


def _remade(old: nn.Parameter, new: nn.Parameter, removed: Sequence[Removed]) -> Callable[[], Tensor]:
    """A function that returns `old` where it still exists, and an equal parameter otherwise."""
    alive, shape, gradient = weakref.ref(old), old.shape, old.grad
    dtype, device, learning = old.dtype, old.device, old.requires_grad
    stays = new.detach()

    def restore() -> Tensor:
        held = alive()
        if held is not None:
            return held
        # Made on the host: the device may have room for what it holds already, and no more.
        whole = torch.empty(shape, dtype=dtype)
        for part in removed:
            part.fill(whole, stays)
        made = nn.Parameter(whole.to(device), requires_grad=learning)
        made.grad = gradient
        return made

    return restore

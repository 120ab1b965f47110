"""Layers' weights, each at hand while its layer runs: on the device from the beginning, on their way, or in files."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import arch

__all__ = ["Resident", "Table", "Weights", "moved_to", "tables"]


class Weights(Protocol):
    """Where the weights stay, and how they come.

    Attributes:
        place: one of WEIGHTS but "auto". moved: bytes that were moved so far. waited: seconds spent waiting for them.
        together: whether all processes must sweep, those without runs too.
    """

    place: str
    together: bool
    moved: int
    waited: float

    def sweep(self, order: Sequence[int]) -> Generator[int, None, None]:
        """Yields layers' indices, each while that layer's weights are at hand; the next one's may be on their way."""
        ...

    def close(self) -> None:
        """Gives back what was taken for the sweeps."""
        ...


class Resident:
    """Weights of a model that is on the device: nothing moves."""

    place, together, moved, waited = "device", False, 0, 0.0

    def sweep(self, order: Sequence[int]) -> Generator[int, None, None]:
        yield from order

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Table:
    """One layer's parameters, each once.

    Attributes:
        names: full names. owners: of each, the modules and attributes that hold it.
        originals: the parameters themselves, on the meta device where the weights are in files.
    """

    names: tuple[str, ...]
    owners: tuple[tuple[tuple[nn.Module, str], ...], ...]
    originals: tuple[nn.Parameter, ...]

    @property
    def bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.originals)

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Lets the modules hold these, in the parameters' order and of their shapes and dtypes."""
        for owners, tensor in zip(self.owners, tensors, strict=True):
            parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            for module, leaf in owners:
                module._parameters[leaf] = parameter

    def put_back(self) -> None:
        self.put(self.originals)


def _table(modules: dict[str, nn.Module]) -> Table:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[int, str] = {}
    originals: dict[int, nn.Parameter] = {}
    for name, module in modules.items():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, leaf))
                names.setdefault(id(parameter), f"{name}.{leaf}" if name else leaf)
                originals.setdefault(id(parameter), parameter)
    return Table(tuple(names.values()), tuple(map(tuple, owners.values())), tuple(originals.values()))


def tables(model: Any, modules: dict[str, nn.Module]) -> tuple[list[Table], Table]:
    """The parameters of each decoder layer, and those outside of all layers.

    Args:
        modules: all of the model's, by name.
    """
    prefix = arch.architecture(model).layers
    count = len(arch.layers_of(model))
    inside: list[dict[str, nn.Module]] = [{} for _ in range(count)]
    outside: dict[str, nn.Module] = {}
    for name, module in modules.items():
        rest = name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else ""
        if rest:
            inside[int(rest.partition(".")[0])][name] = module
        else:
            outside[name] = module
    return [_table(of) for of in inside], _table(outside)


@contextmanager
def moved_to(
    device: torch.device, outside: Table, modules: dict[str, nn.Module], held: Sequence[Tensor]
) -> Iterator[None]:
    """Everything but the layers' parameters on a device for a while: parameters outside of the layers, whose values are
    `held`, and all buffers."""
    before = [(module, leaf, b) for module in modules.values() for leaf, b in module._buffers.items() if b is not None]
    try:
        outside.put([tensor.to(device) for tensor in held])
        for module, leaf, buffer in before:
            module._buffers[leaf] = buffer.to(device)
        yield
    finally:
        outside.put_back()
        for module, leaf, buffer in before:
            module._buffers[leaf] = buffer

"""Decoder layers as units: scores of them, and which of them stay.

Layers lie beside the groups and are no group. A group's units are rows and columns of one layer's matrices, its members
say which, and its statistics come member by member; a layer goes with all of its groups and with what no group has
(norms, a router), and may hold more parameters than its neighbour. So scores and plans carry the layers in a field of
their own, and a layer that goes takes its groups along: in a plan they keep no unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import HywiaError
from .groups import is_count, short
from .record import Record, frozen_record

__all__ = ["Depth", "LayerScores"]


def _check_parameters(parameters: Any) -> None:
    if type(parameters) is not tuple or not parameters or not all(is_count(p, 1) for p in parameters):
        raise HywiaError(f"layers: expected the number of parameters of each layer as a tuple, got {short(parameters)}")


@dataclass(frozen=True, eq=False)
class LayerScores:
    """One number per decoder layer; the layer of the least goes first. An instance equals itself alone.

    Attributes:
        parameters: of each layer, all that leaves with it.
        values: float32 `[layers]`; larger is more important.
        loss: float32 `[layers]`, an estimate of what the layer's removal adds to the loss when those of smaller values
            have gone, in the unit of `Scores.loss`; None where the criterion has none (magnitude, random).
        record: how it was done. Read-only, and JSON.

    Raises:
        HywiaError: a field is not as described here, or holds NaN or Inf.
    """

    parameters: tuple[int, ...]
    values: Tensor
    loss: Tensor | None = None
    record: Mapping[str, Any] = field(default_factory=Record)

    def __post_init__(self) -> None:
        _check_parameters(self.parameters)
        for what, value in (("scores", self.values), ("loss estimates", self.loss)):
            if value is None and what != "scores":
                continue
            expected = f"expected {what} float32 [{len(self.parameters)}] on the CPU"
            if not isinstance(value, Tensor) or value.shape != (len(self.parameters),):
                raise HywiaError(f"layers: {expected}, got {short(getattr(value, 'shape', value))}")
            if value.dtype is not torch.float32 or not value.is_cpu:
                raise HywiaError(f"layers: {expected}, got {value.dtype} on {value.device}")
            if not bool(torch.isfinite(value).all()):
                raise HywiaError(f"layers: expected finite {what}, got NaN or Inf; measure the layers again")
        object.__setattr__(self, "record", frozen_record(self.record))

    @property
    def order(self) -> list[int]:
        """The layers as they go, the first one first; of equals the higher index goes before the lower."""
        lowest = torch.sort(self.values.flip(0), stable=True).indices
        return [len(self.parameters) - 1 - i for i in lowest.tolist()]


@dataclass(frozen=True)
class Depth:
    """Which decoder layers stay.

    Attributes:
        parameters: of each layer before the cut, all that leaves with it.
        keep: indices of the layers that stay, ascending, at least one.

    Raises:
        HywiaError: a field is not as described here.
    """

    parameters: tuple[int, ...]
    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_parameters(self.parameters)
        keep = self.keep
        if type(keep) is not tuple or not all(is_count(i, 0) for i in keep) or list(keep) != sorted(set(keep)):
            raise HywiaError(f"layers: expected indices of layers, ascending and each once, got {short(keep)}")
        if not keep or keep[-1] >= len(self.parameters):
            raise HywiaError(
                f"layers: expected one of layers 0 to {len(self.parameters) - 1} to stay, or more, got {short(keep)}"
            )

    @property
    def gone(self) -> tuple[int, ...]:
        """Indices of the layers that go, ascending."""
        return tuple(i for i in range(len(self.parameters)) if i not in set(self.keep))

    @property
    def removed(self) -> int:
        """Parameters of the layers that go."""
        return sum(self.parameters[i] for i in self.gone)

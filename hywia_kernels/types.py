"""What the stages hand each other: small frozen dataclasses, all tensors on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Group", "Member", "Plan", "Scores", "Statistics"]


@dataclass(frozen=True)
class Member:
    """One matrix of a group: unit `u` is its rows (axis 0) or columns (axis 1) from `start + u·group_size`, so many.

    Attributes:
        module: its name in the model.
        axis: of the stored parameter, on which the units lie; of `parameter[index]` where there is an index.
        group_size: consecutive rows or columns of one unit.
        start: the first unit's first; not 0 where one parameter holds several matrices.
        parameter: the module's.
        index: which of a stacked parameter's matrices it is; None: the parameter is one matrix (or a vector), or the
            units are the matrices of a stacked one.
        bias: parameter of the module with one entry per row or column of `axis`; None: there is none.
    """

    module: str
    axis: int
    group_size: int
    start: int = 0
    parameter: str = "weight"
    index: int | None = None
    bias: str | None = None


@dataclass(frozen=True)
class Group:
    """The coupled matrices of one layer that lose units together.

    Attributes:
        name: `<layer>.<kind>`, unique in a model, e.g. "model.layers.3.mlp".
        kind: "mlp", "attention" or "experts".
        layer: index of the decoder layer.
        units: how many units there are.
        unit: what one unit is: "channel", "head", "kv_group" or "expert".
        members: the matrices, in the table's order; the last is the one a unit sends its output on through.
        unit_parameters: parameters (weights, row biases, vectors) that leave with one unit.
        stock_counts: unit counts a stock config can describe when every layer has the same; empty means any.
        vectors: parameters with entries per unit that leave with it and are not scored.
        least: fewest units that can stay.
        together: groups of one such name must keep as many units as each other; "" means that it is alone.
        width_field: config field that holds the width; "" where the config has none.
    """

    name: str
    kind: str
    layer: int
    units: int
    unit: str
    members: tuple[Member, ...]
    unit_parameters: int
    stock_counts: tuple[int, ...] = ()
    vectors: tuple[Member, ...] = ()
    least: int = 1
    together: str = ""
    width_field: str = ""


@dataclass(frozen=True)
class Statistics:
    """What one calibration pass yields, per unit.

    Attributes:
        groups: the groups measured.
        fine: group name -> order ("first", "second", "mixed") -> float32 `[units]`, summed over members.
        coarse: group name -> float32 `[members, samples, units]`: `h_s(u) = Σ G_s·w` over the unit's part of one
            member, the derivative of sample `s`'s loss with respect to a multiplicative mask on it.
        parameters: parameters of the whole model (tied ones once).
        fingerprint: of the weights that were measured.
        record: how it was done: samples, seed, calibration hash, backend, device, versions.
    """

    groups: tuple[Group, ...]
    fine: Mapping[str, Mapping[str, Tensor]]
    coarse: Mapping[str, Tensor]
    parameters: int
    fingerprint: str
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """One number per unit; larger is more important, comparable within one group.

    Attributes:
        groups: the groups scored.
        values: group name -> float32 `[units]`.
        loss: group name -> float32 `[units]`, an estimate of what removing the unit adds to the loss, comparable
            between kinds of units; empty where the criterion has none (magnitude, random).
        parameters: parameters of the whole model (tied ones once).
        fingerprint: of the weights that were scored.
        record: criterion, fusion, order and the statistics' record.
    """

    groups: tuple[Group, ...]
    values: Mapping[str, Tensor]
    loss: Mapping[str, Tensor]
    parameters: int
    fingerprint: str
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Units to keep per group, and what that costs.

    Attributes:
        groups: the groups as they are before the cut.
        keep: group name -> int64 `[kept]`, ascending; every group of the model has an entry.
        parameters_before, parameters_after: of the whole model.
        layout: "uniform" (every layer of a kind equally wide: a stock config describes it) or "adaptive".
        fingerprint: of the weights the scores came from.
        record: the request (ratio, protocol, alignment, ...) and the scores' record.
    """

    groups: tuple[Group, ...]
    keep: Mapping[str, Tensor]
    parameters_before: int
    parameters_after: int
    layout: str
    fingerprint: str
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Share of all parameters that goes, exactly."""
        return 1.0 - self.parameters_after / self.parameters_before

    def widths(self, kind: str) -> list[int]:
        """Units kept in each layer's group of `kind`, by layer."""
        groups = sorted((g for g in self.groups if g.kind == kind), key=lambda g: g.layer)
        return [self.keep[g.name].numel() for g in groups]

"""What the stages hand each other: frozen dataclasses that check themselves; all tensors are on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import HywiaError
from ..settings import LAYOUTS, ORDERS
from .groups import Group, by_name, check_together, is_count, removed_parameters, short
from .layers import Depth, LayerScores
from .record import Record, frozen_record

__all__ = ["Plan", "Scores", "Statistics"]


def _check_entries(what: str, entries: Any, groups: Mapping[str, Group]) -> None:
    """Refuse anything but a mapping with one entry for every group."""
    if not isinstance(entries, Mapping):
        raise HywiaError(f"{what}: expected a mapping from groups' names, got {short(entries)}")
    if entries.keys() == groups.keys():
        return
    missing, extra = [n for n in groups if n not in entries], [n for n in entries if n not in groups]
    if missing:
        raise HywiaError(f"{missing[0]}: expected an entry of {what} for every group, got none for it")
    raise HywiaError(f"{what}: expected entries of the groups alone, got one of {extra[0]!r}")


def _check_tensor(name: str, what: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    if not isinstance(value, Tensor):
        raise HywiaError(f"{name}: expected {what} as a tensor, got {short(value)}")
    if value.shape != shape or value.dtype is not dtype or not value.is_cpu or value.layout is not torch.strided:
        kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
        raise HywiaError(
            f"{name}: expected {what} {str(dtype).removeprefix('torch.')} {list(shape)} on the CPU, got {kind}"
        )


def _check_finite(name: str, what: str, value: Tensor, way_out: str) -> None:
    # The sum of finite numbers is finite but for an overflow, and takes no mask as large as they are.
    if not bool(torch.isfinite(value.detach().sum(dtype=torch.float64))):
        raise HywiaError(f"{name}: expected finite {what}, got NaN or Inf; {way_out}")


def _check_model_and_freeze_record(self: Statistics | Scores | Plan, **parameters: int) -> None:
    """Check the fields that describe the whole model, and make the record read-only.

    Args:
        parameters: field name -> number of parameters of the whole model.
    """
    for name, value in parameters.items():
        if not is_count(value, 1) or value >= 1 << 63:
            raise HywiaError(f"{name}: expected the number of parameters of a model, got {short(value)}")
    total = max(parameters.values())
    for group in self.groups:
        if group.units * group.unit_parameters > total:
            raise HywiaError(
                f"{group.name}: expected units of at most {total:,} parameters together, which are the model's, got "
                f"{group.units} of {short(group.unit_parameters)}"
            )
    if type(self.fingerprint) is not str:
        raise HywiaError(f"fingerprint: expected a string, got {short(self.fingerprint)}")
    object.__setattr__(self, "record", frozen_record(self.record))


@dataclass(frozen=True, eq=False)
class Statistics:
    """What one calibration pass yields for each unit. An instance equals itself alone.

    Attributes:
        groups: the groups measured.
        fine: group name -> order ("first", "second", "mixed"; those that were measured, the same for all groups) ->
            float32 `[units]`, summed over members.
        coarse: group name -> float32 `[members, samples, units]`: `h_s(u) = Σ G_s·w` over the unit's part of one
            member, the derivative of sample `s`'s loss with respect to a multiplicative mask on it. Empty where the
            samples' own values were not kept.
        parameters: parameters of the whole model (tied ones once).
        fingerprint: of the weights that were measured.
        record: how it was done: samples, seed, calibration hash, backend, device, versions. Read-only, and JSON.
        known_finite: an argument alone, no attribute: the caller has made sure that all values are finite.
        moments: in the place of `coarse`, group name -> float64 `[2, members, units]`: the means over all samples of
            `h_s` and of `h_s²`.

    Raises:
        HywiaError: a field is not as described here, or holds NaN or Inf; the message names the group.
    """

    groups: tuple[Group, ...]
    fine: Mapping[str, Mapping[str, Tensor]]
    coarse: Mapping[str, Tensor]
    parameters: int
    fingerprint: str
    record: Mapping[str, Any] = field(default_factory=Record)
    known_finite: InitVar[bool] = False
    moments: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self, known_finite: bool) -> None:
        groups = by_name(self.groups)
        _check_entries("fine", self.fine, groups)
        by_moments = isinstance(self.moments, Mapping) and len(self.moments) > 0
        if by_moments and isinstance(self.coarse, Mapping) and self.coarse:
            raise HywiaError("moments: expected coarse estimates by sample or their moments, got both")
        what, entries = ("moments", self.moments) if by_moments else ("coarse", self.coarse)
        _check_entries(what, entries, groups)
        samples, measured = 1, self.orders
        if not by_moments:
            first = next(iter(self.coarse.values()))
            samples = first.shape[1] if isinstance(first, Tensor) and first.dim() == 3 else 1
            if not samples:
                raise HywiaError(f"{next(iter(groups))}: expected coarse estimates of at least one sample, got none")
        for name, group in groups.items():
            orders = self.fine[name]
            if not isinstance(orders, Mapping) or not measured or set(orders) != set(measured):
                expected = ", ".join(measured or ORDERS)
                raise HywiaError(f"{name}: expected fine estimates of the orders {expected}, got {short(orders)}")
            for order in measured:
                _check_tensor(name, f"fine {order}", orders[order], (group.units,))
            members = len(group.members)
            if by_moments:
                _check_tensor(name, what, entries[name], (2, members, group.units), torch.float64)
            else:
                _check_tensor(name, what, entries[name], (members, samples, group.units))
            for value in () if known_finite else (*orders.values(), entries[name]):
                _check_finite(name, "statistics", value, "the measurement is damaged: calibrate again")
        _check_model_and_freeze_record(self, parameters=self.parameters)

    @property
    def orders(self) -> tuple[str, ...]:
        """The orders that were measured, of ORDERS."""
        first = next(iter(self.fine.values()), {})
        return tuple(order for order in ORDERS if order in first) if isinstance(first, Mapping) else ()


@dataclass(frozen=True, eq=False)
class Scores:
    """One number per unit; larger is more important, comparable within one group. An instance equals itself alone.

    Attributes:
        groups: the groups scored.
        values: group name -> float32 `[units]`.
        loss: group name -> float32 `[units]`, an estimate of what removing the unit adds to the loss, comparable
            between kinds of units; empty where the criterion has none (magnitude, random).
        parameters: parameters of the whole model (tied ones once).
        fingerprint: of the weights that were scored.
        record: criterion, fusion, order and the statistics' record. Read-only, and JSON.
        layers: of whole decoder layers; None where they were not scored.

    Raises:
        HywiaError: a field is not as described here, or holds NaN or Inf; the message names the group.
    """

    groups: tuple[Group, ...]
    values: Mapping[str, Tensor]
    loss: Mapping[str, Tensor]
    parameters: int
    fingerprint: str
    record: Mapping[str, Any] = field(default_factory=Record)
    layers: LayerScores | None = None

    def __post_init__(self) -> None:
        self.check()
        _check_model_and_freeze_record(self, parameters=self.parameters)
        if self.layers is not None:
            _check_layers(self.groups, self.layers.parameters, self.parameters)

    def check(self) -> None:
        """Check the tensors against the groups once more, before a later use: they may have been written to meanwhile.

        Raises:
            HywiaError: a tensor is not as the class describes it.
        """
        groups = by_name(self.groups)
        _check_entries("values", self.values, groups)
        if not isinstance(self.loss, Mapping) or self.loss:
            _check_entries("loss", self.loss, groups)
        for name, group in groups.items():
            for what, entries in (("scores", self.values), ("loss estimates", self.loss)):
                if entries:
                    _check_tensor(name, what, entries[name], (group.units,))
                    _check_finite(name, what, entries[name], "check the statistics of this group, or score again")


@dataclass(frozen=True, eq=False)
class Plan:
    """Units to keep per group, and how many parameters that leaves. An instance equals itself alone.

    Attributes:
        groups: the groups as they are before the cut.
        keep: group name -> int64 `[kept]`, ascending; every group of the model has an entry, which is empty for those
            of a layer that goes. Channels of an expert that goes have one as long as those of the experts that stay,
            and go all the same.
        parameters_before, parameters_after: of the whole model.
        layout: "uniform" (every layer of a kind equally wide: a stock config describes it) or "adaptive".
        fingerprint: of the weights the scores came from.
        record: the request (ratio, protocol, alignment, ...) and the scores' record. Read-only, and JSON.
        depth: which decoder layers stay; None: all.

    Raises:
        HywiaError: a field is not as described here: a group has no entry or too few units, indices are not ascending
            or not the group's, stacked experts have different widths, or a number of parameters is not what the kept
            units leave.
    """

    groups: tuple[Group, ...]
    keep: Mapping[str, Tensor]
    parameters_before: int
    parameters_after: int
    layout: str
    fingerprint: str
    record: Mapping[str, Any] = field(default_factory=Record)
    depth: Depth | None = None

    def __post_init__(self) -> None:
        _check_entries("keep", self.keep, by_name(self.groups))
        if self.depth is not None:
            _check_layers(self.groups, self.depth.parameters, self.parameters_before)
            _check_gone(self.groups, self.depth, self.keep)
        staying = self.staying
        counts = {g.name: _checked_count(g, self.keep[g.name]) for g in staying}
        check_together(staying, counts)
        if self.layout not in LAYOUTS:
            raise HywiaError(f"layout: expected one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        _check_model_and_freeze_record(
            self, parameters_before=self.parameters_before, parameters_after=self.parameters_after
        )
        removed = removed_parameters(staying, counts)
        removed += 0 if self.depth is None else self.depth.removed
        if self.parameters_before - removed != self.parameters_after:
            raise HywiaError(
                f"parameters_after: expected {self.parameters_before - removed:,}, which is what the kept units leave "
                f"of {self.parameters_before:,}, got {self.parameters_after:,}"
            )

    @property
    def ratio(self) -> float:
        """The exact share of all parameters that is removed, in [0, 1)."""
        return 1.0 - self.parameters_after / self.parameters_before

    @property
    def staying(self) -> tuple[Group, ...]:
        """The groups of the layers that stay."""
        gone = () if self.depth is None else self.depth.gone
        return tuple(g for g in self.groups if g.layer not in gone)

    def widths(self, kind: str) -> list[int]:
        """Units kept in each layer's group of `kind`, by layer; 0 in those of layers that go."""
        groups = sorted((g for g in self.groups if g.kind == kind), key=lambda g: g.layer)
        return [self.keep[g.name].numel() for g in groups]


def _check_layers(groups: tuple[Group, ...], parameters: tuple[int, ...], total: int) -> None:
    """Refuse numbers of parameters by layer that are not of the model whose groups these are."""
    last = max(g.layer for g in groups)
    if last >= len(parameters) or sum(parameters) > total:
        raise HywiaError(
            f"layers: expected the parameters of at least {last + 1} layers, at most {total:,} together, got "
            f"{len(parameters)} of {sum(parameters):,}"
        )


def _check_gone(groups: tuple[Group, ...], depth: Depth, keep: Mapping[str, Tensor]) -> None:
    for group in groups:
        kept = keep[group.name]
        if group.layer in depth.gone and (not isinstance(kept, Tensor) or kept.numel()):
            raise HywiaError(f"plan: {group.name} keeps {short(kept)}, but its layer {group.layer} goes")


def _checked_count(group: Group, keep: Any) -> int:
    """How many units a group keeps, once their indices have been checked."""
    count = keep.numel() if isinstance(keep, Tensor) else 0
    if isinstance(keep, Tensor) and count < group.min_units:
        raise HywiaError(
            f"plan: {group.name} keeps {count or 'nothing'}; every such group must keep at least "
            f"{'one' if group.min_units == 1 else group.min_units} {group.unit}"
        )
    _check_tensor(group.name, "kept units", keep, (count,), torch.int64)
    # Ascending, so the first and the last tell the range.
    if keep[0] < 0 or keep[-1] >= group.units or bool((keep[1:] <= keep[:-1]).any()):
        raise HywiaError(
            f"plan: {group.name} keeps units {short(keep.tolist())}; expected each once, ascending, and of 0 to "
            f"{group.units - 1}"
        )
    return count

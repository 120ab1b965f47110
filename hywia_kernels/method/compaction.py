"""What a plan leaves of one parameter: which rows and columns stay, and the tensor of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .. import arch, ops
from ..types import Group, Member
from .undo import complement

__all__ = [
    "ParameterCuts",
    "Parts",
    "Selected",
    "by_parameter",
    "compact",
    "compact_bias",
    "kept_entries",
    "rescaled",
    "unit_entries",
]

Parts = list[tuple[Member, Group]]
# Axis, entries that stay, and which of the matrices stacked in the parameter, before the cut and after it.
Selected = tuple[int, Tensor, int | None, int | None]
_Name = tuple[str, str]  # module, and the parameter's name in it


def unit_entries(units: Tensor, group_size: int) -> Tensor:
    """Row or column indices of the units, int64, ascending; each unit has `group_size` consecutive ones."""
    return (units[:, None] * group_size + torch.arange(group_size)).reshape(-1)


def kept_entries(size: int, parts: Sequence[tuple[Member, Group]], keep: Mapping[str, Tensor]) -> Tensor:
    """Indices that stay of an axis of `size`, on which the parts' units lie; entries that belong to no unit stay."""
    stays = torch.ones(size, dtype=torch.bool)
    for member, group in parts:
        gone = complement(group.units, keep[group.name])
        stays[member.start + unit_entries(gone, member.group_size)] = False
    return stays.nonzero()[:, 0]


def by_parameter(groups: Sequence[Group]) -> dict[_Name, Parts]:
    """Every parameter that groups lie on, with all its members, vectors last."""
    parts: dict[_Name, Parts] = {}
    for group in groups:
        for member in (*group.members, *group.vectors):
            parts.setdefault((member.module, member.parameter), []).append((member, group))
    return parts


def _taken(matrix: Tensor, entries: Tensor, axis: int, backend: str | None) -> Tensor:
    """`ops.compact`, and the shape alone of a tensor without memory."""
    if matrix.is_meta:
        return matrix.index_select(axis, entries.to(matrix.device))
    return ops.compact(matrix, entries, axis, backend=backend)


def compact(
    parameter: Tensor, parts: Parts, keep: Mapping[str, Tensor], backend: str | None
) -> tuple[Tensor, list[Selected]]:
    """The part of a parameter that stays, and where it lay; the parameter itself and nothing where all of it stays."""
    stacked = [part for part in parts if part[0].index is not None]
    whole = [part for part in parts if part[0].index is None]
    narrower = any(keep[g.name].numel() < g.units for _, g in stacked)
    if whole:
        axis = whole[0][0].axis
        flat = parameter.flatten(1) if parameter.dim() > 2 else parameter
        entries = kept_entries(flat.shape[axis], whole, keep)
        if entries.numel() < flat.shape[axis] and not narrower:
            kept = _taken(flat, entries, axis, backend)
            return kept.unflatten(1, parameter.shape[1:]) if parameter.dim() > 2 else kept, [
                (axis, entries, None, None)
            ]
    if not narrower:
        return parameter, []
    return _compact_stack(parameter, stacked, whole, keep, backend)


def _compact_stack(
    parameter: Tensor, stacked: Parts, whole: Parts, keep: Mapping[str, Tensor], backend: str | None
) -> tuple[Tensor, list[Selected]]:
    """`compact` of a stack whose matrices become narrower, and of which some may go altogether."""
    axis, size = stacked[0][0].axis, parameter.shape[1 + stacked[0][0].axis]
    stays = kept_entries(len(parameter), whole, keep).tolist()
    per_matrix = {e: kept_entries(size, [part for part in stacked if part[0].index == e], keep) for e in stays}
    shape = [len(stays), *parameter.shape[1:]]
    shape[1 + axis] = per_matrix[stays[0]].numel()
    out = parameter.detach().new_empty(shape)
    if not out.is_meta:
        for (e, entries), into in zip(per_matrix.items(), out, strict=True):
            ops.compact(parameter[e], entries, axis, out=into, backend=backend)
    places = {e: place for place, e in enumerate(stays)}
    none = torch.empty(0, dtype=torch.int64)
    return out, [(axis, per_matrix.get(e, none), e, places.get(e)) for e in range(len(parameter))]


def compact_bias(
    bias: Tensor, parts: Parts, keep: Mapping[str, Tensor], backend: str | None
) -> tuple[Tensor, list[Selected]]:
    """The entries of a bias that stay, and which these are."""
    entries = kept_entries(bias.numel(), parts, keep)
    return _taken(bias, entries, 0, backend), [(0, entries, None, None)]


def rescaled(entry: arch.Architecture, group: Group, kept: int) -> Iterator[tuple[_Name, Callable[[Tensor], Tensor]]]:
    """Parameters of a norm over all heads, and of the matrix before it, with what becomes of their values when `kept`
    of a group's heads stay, so that the cut does not change the norm's output.

    The norm divides by the rms over fewer features after the cut. With the survivors' rows scaled by c = √(kept /
    units) their mean square is what it was with zeros in place of the removed ones, and 1/c in the norm's weight gives
    the same output, eps included.
    """
    scale = (kept / group.units) ** 0.5
    prefix = f"{entry.layers}.{group.layer}"
    for norm, linear in entry.attention.wide_norms.items():
        yield (f"{prefix}.{linear}", "weight"), lambda values: values * scale
        yield (f"{prefix}.{linear}", "bias"), lambda values: values * scale
        yield (f"{prefix}.{norm}", "weight"), lambda values: values / scale


class ParameterCuts:
    """What becomes of each parameter of a model under a plan, asked for one at a time and in any order.

    Args:
        entry: of the model. groups: that stay, as they are before the cut. keep: of the plan.
        backend: of `ops.compact`.
    """

    def __init__(
        self,
        entry: arch.Architecture,
        groups: Sequence[Group],
        keep: Mapping[str, Tensor],
        backend: str | None = None,
    ) -> None:
        self._keep, self._backend = keep, backend
        cut = {g.name for g in groups if keep[g.name].numel() < g.units}
        self._parts: dict[_Name, Parts] = {}
        self._biases: dict[_Name, Parts] = {}
        for name, parts in by_parameter(groups).items():
            if not any(group.name in cut for _, group in parts):
                continue
            self._parts[name] = parts
            biased = [part for part in parts if part[0].bias is not None]
            if biased:
                self._biases[name[0], biased[0][0].bias or ""] = biased
        self._rescaled = dict(
            item
            for group in groups
            if group.kind == "attention" and group.name in cut
            for item in rescaled(entry, group, keep[group.name].numel())
        )

    def of(self, name: str, values: Tensor) -> Tensor:
        """What stays of the parameter of this name, whose values these are."""
        module, _, leaf = name.rpartition(".")
        key = (module, leaf)
        if key in self._parts:
            values, _ = compact(values, self._parts[key], self._keep, self._backend)
        elif key in self._biases:
            values, _ = compact_bias(values, self._biases[key], self._keep, self._backend)
        return self._rescaled[key](values) if key in self._rescaled else values

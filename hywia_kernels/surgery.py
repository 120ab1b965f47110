"""Cut a model in place, matrix by matrix, or mask the same units for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import arch, ops, progress
from .errors import HywiaError
from .types import Group, Plan
from .weights import fingerprint

__all__ = ["mask", "prune", "resize"]


def _entries(units: Tensor, group_size: int) -> Tensor:
    """Row or column indices of units of `group_size` consecutive ones, ascending."""
    return (units[:, None] * group_size + torch.arange(group_size)).reshape(-1)


def _checked_groups(model: nn.Module, plan: Plan) -> tuple[Group, ...]:
    """The plan's groups, after making sure that they are still the model's: nothing is touched when they are not."""
    found = arch.groups(model)
    if found != plan.groups:
        theirs = {g.name: g.units for g in plan.groups}
        differ = [g.name for g in found if theirs.get(g.name) != g.units]
        raise HywiaError(
            f"plan: made for another model, or this one is pruned already (first difference: "
            f"{differ[0] if differ else 'its groups'}); plan again from this model's scores"
        )
    if fingerprint(model) != plan.fingerprint:
        raise HywiaError(
            "plan: made from the scores of another model (the weights differ); score this model, in this dtype"
        )
    for group in found:
        keep = plan.keep.get(group.name)
        if keep is None or keep.numel() == 0:
            raise HywiaError(f"plan: {group.name} keeps nothing; every group must keep at least one {group.unit}")
    return found


def _replace(parameter: Tensor, kept: Tensor) -> nn.Parameter:
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


@torch.no_grad()
def prune(model: Any, plan: Plan, *, backend: str | None = None) -> None:
    """Remove a plan's units from a model, in place.

    One matrix is cut at a time and its old storage released, so the peak is the model plus one matrix. The config's
    widths follow when the plan is uniform; with an adaptive plan they stay what they were and `save` writes the
    per-layer widths.

    Args:
        model: the model the scores came from. plan: of `selection.plan`. backend: of `ops.compact`.

    Raises:
        HywiaError: the plan is not this model's.
    """
    for group in progress.track(_checked_groups(model, plan), "cutting"):
        keep = plan.keep[group.name]
        if keep.numel() == group.units:
            continue
        for member in group.members:
            linear = model.get_submodule(member.module)
            entries = _entries(keep, member.group_size)
            linear.weight = _replace(
                linear.weight, ops.compact(linear.weight.detach(), entries, member.axis, backend=backend)
            )
            linear.weight.grad = None
            if member.axis == 0:
                if linear.bias is not None:
                    linear.bias = _replace(linear.bias, ops.compact(linear.bias.detach(), entries, backend=backend))
                linear.out_features = entries.numel()
            else:
                linear.in_features = entries.numel()
    for field, widths in arch.config_widths(model, arch.groups(model)).items():
        if len(set(widths)) == 1:
            setattr(model.config, field, widths[0])


def resize(model: nn.Module, counts: Mapping[str, int]) -> None:
    """Give groups other widths, in place: each member's parameters are replaced by uninitialised ones of the new shape,
    on their device (meta included) and in their dtype. For models whose weights are about to be loaded.

    Args:
        model: of a known architecture. counts: group name -> units; groups that it leaves out keep their width.

    Raises:
        HywiaError: an unknown group, or fewer units than one.
    """
    found = {g.name: g for g in arch.groups(model)}
    for name, units in counts.items():
        group = found.get(name)
        if group is None:
            raise HywiaError(f"resize: expected groups of the model, got {name!r}; groups(model) lists them")
        if units < 1:
            raise HywiaError(f"resize: expected at least one {group.unit} in {name}, got {units}")
        if units == group.units:
            continue
        for member in group.members:
            linear = model.get_submodule(member.module)
            assert isinstance(linear, nn.Linear)
            shape = list(linear.weight.shape)
            shape[member.axis] = units * member.group_size
            linear.out_features, linear.in_features = shape
            linear.weight = _replace(linear.weight, linear.weight.detach().new_empty(shape))
            if member.axis == 0 and linear.bias is not None:
                linear.bias = _replace(linear.bias, linear.bias.new_empty(shape[0]))


@torch.no_grad()
def mask(model: Any, plan: Plan) -> None:
    """Zero a plan's removed units in place and keep the shapes: what `prune` must agree with.

    Rows, their biases and columns are all zeroed, so every member of a removed unit is silent by itself.
    """
    for group in _checked_groups(model, plan):
        keep = torch.zeros(group.units, dtype=torch.bool)
        keep[plan.keep[group.name]] = True
        removed = torch.nonzero(~keep)[:, 0]
        for member in group.members:
            linear = model.get_submodule(member.module)
            entries = _entries(removed, member.group_size).to(linear.weight.device)
            linear.weight.index_fill_(member.axis, entries, 0.0)
            if member.axis == 0 and linear.bias is not None:
                linear.bias.index_fill_(0, entries, 0.0)

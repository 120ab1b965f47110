"""What stands in for the forwards of a model's modules during the fused passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .. import arch
from ..types import Group
from . import recompute
from .kernels import gate_formula, norm_formula, usable
from .linear import Scorer, Target, scored_forward
from .results import Results

__all__ = ["instrument"]

Replacements = list[tuple[nn.Module, Any]]


def instrument(model: Any, found: Sequence[Group], results: Results, scorer: Scorer) -> Replacements:
    """Replacements for `patches.forward_replaced`: linear layers score, norms and gates are not kept for backward.

    A module whose `forward` somebody else has replaced keeps it, but for the linear layers, which must score.
    """
    entry = arch.architecture(model)
    replacements: Replacements = []
    for group in found:
        for index, member in enumerate(group.members):
            linear = model.get_submodule(member.module)
            weight = linear.weight.detach()
            target = Target(group.name, member, weight, results.fine[group.name], results.coarse[group.name][index])
            skippable = entry.residual is not None and member.module.endswith(f".{entry.residual}")
            skippable = skippable and not linear._forward_hooks
            replacements.append((linear, scored_forward(linear, target, scorer, skippable)))
    for layer in model.get_submodule(entry.layers):
        replacements += _in_layer(layer, entry, scorer.backend)
    if entry.final_norm is not None:
        dtype = model.get_submodule(found[-1].members[-1].module).weight.dtype
        replacements += _norm(model.get_submodule(entry.final_norm), dtype, scorer.backend)
    return replacements


def _in_layer(layer: nn.Module, entry: arch.Architecture, backend: str | None) -> Replacements:
    down: Any = layer.get_submodule(entry.mlp.columns[0])
    replacements: Replacements = []
    for name in entry.norms:
        replacements += _norm(layer.get_submodule(name), down.weight.dtype, backend)
    gated = entry.mlp.gated
    if gated is not None:
        mlp = layer.get_submodule(gated.module)
        if "forward" not in vars(mlp):
            gate, up = (layer.get_submodule(name) for name in entry.mlp.rows)
            formula = gate_formula(layer.get_submodule(gated.activation), usable(down.weight.device, backend))
            replacements.append((mlp, _gated(gate, up, down, formula)))
    return replacements


def _norm(norm: nn.Module, dtype: torch.dtype, backend: str | None) -> Replacements:
    if "forward" in vars(norm):
        return []
    device = next(norm.parameters()).device
    return [(norm, _recomputed(norm_formula(norm, dtype, usable(device, backend))))]


def _recomputed(formula: recompute.Formula) -> Callable:
    return lambda hidden: recompute.apply(formula, hidden)


def _gated(gate: nn.Module, up: nn.Module, down: nn.Module, formula: recompute.Formula) -> Callable:
    return lambda hidden: down(recompute.apply(formula, gate(hidden), up(hidden)))

"""What stands in for the forwards of a model's modules during the fused passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .. import arch
from ..types import Group
from . import recompute
from .block import Block, BlockForward, handed_out
from .experts import experts_forward, router_forward
from .flash import flash_attention
from .gated import GatedMlp, gated_forward, watched
from .kernels import gate_formula, norm_formula, usable
from .linear import Scorer, Target, scored_forward, scored_rows

__all__ = ["instrument"]

Replacements = list[tuple[nn.Module, Any]]
Targets = dict[nn.Module, tuple[Target, ...]]  # of each module's matrices


def instrument(
    model: Any, modules: Mapping[str, Any], found: Sequence[Group], scorer: Scorer
) -> tuple[Replacements, bool]:
    """Replacements for `patches.forward_replaced`: linear layers score, norms and gates are not kept for backward; and
    whether every decoder layer runs as one node.

    A module whose `forward` somebody else has replaced keeps it, but for the linear layers, which must score.

    Args:
        modules: the model's, by name.
    """
    entry = arch.architecture(model)
    results = scorer.results
    targets: Targets = {}
    experts: dict[nn.Module, dict[tuple[str, int], tuple[Target, ...]]] = {}
    for matrix in arch.matrices(modules, found):
        module = modules[matrix.module]
        stored = module._parameters[matrix.parameter]
        for group, i in matrix.members:
            member = group.members[i]
            weight = arch.view(modules, member, group.units).detach()
            whole = weight.shape == stored.shape[-2:]
            outputs = None if whole else slice(member.start, member.start + group.units * member.group_size)
            results_of = results.fine[group.name], results.coarse[group.name][i]
            target = Target(member, weight, *results_of, outputs, matrix.transposed)
            if matrix.index is None:
                targets[module] = _with(targets.get(module, ()), target)
            else:
                of_module = experts.setdefault(module, {})
                of_module[matrix.parameter, matrix.index] = _with(
                    of_module.get((matrix.parameter, matrix.index), ()), target
                )
    replacements: Replacements = []
    blocks = True
    for i, layer in enumerate(modules[entry.layers]):
        parts = _Parts(layer, entry, modules, f"{entry.layers}.{i}.")
        stacks = {m: experts[m] for m in layer.modules() if m in experts} if experts else {}
        made = _with_experts(parts, targets, stacks, scorer) if stacks else _in_layer(parts, targets, scorer)
        blocks = blocks and made[0][0] is layer
        replacements += made
    if entry.final_norm is not None:
        replacements += _norm(modules[entry.final_norm], model.dtype, scorer.backend)
    return replacements, blocks


@dataclass(frozen=True)
class _Parts:
    """A decoder layer, and its modules by their names in the architecture's entry. They are looked up among all of the
    model's: walking down from the layer would take longer."""

    layer: nn.Module
    entry: arch.Architecture
    modules: Mapping[str, Any]
    prefix: str

    def __getitem__(self, name: str) -> Any:
        return self.modules[self.prefix + name]

    def several(self, names: Sequence[str]) -> list[Any]:
        """Each once: a module that holds several matrices is named several times."""
        return [self[name] for name in dict.fromkeys(names)]

    def projections(self) -> list[Any]:
        names = self.entry.attention
        return self.several((names.query, names.key, names.value, names.output))


def _with(targets: tuple[Target, ...], new: Target) -> tuple[Target, ...]:
    """`targets` and one more; a matrix that is there already goes on under the one that came first: layers bring what
    serves its axis."""
    for i, known in enumerate(targets):
        if known.outputs == new.outputs:
            return (*targets[:i], replace(known, also=replace(new, also=known.also)), *targets[i + 1 :])
    return (*targets, new)


def _in_layer(parts: _Parts, targets: Targets, scorer: Scorer) -> Replacements:
    entry, layer = parts.entry, parts.layer
    single, rows, columns = parts.projections(), parts.several(entry.mlp.rows), parts.several(entry.mlp.columns)
    residual = None if entry.residual is None else parts[entry.residual]
    if residual is not None and residual._forward_hooks:
        residual = None  # what a hook makes of the output may depend on its values
    weight: Any = columns[0].weight
    replacements: Replacements = []
    whole = False
    if entry.mlp.gated is not None:
        module, activation = parts[entry.mlp.gated.module], parts[entry.mlp.gated.activation]
        formula = gate_formula(activation, usable(weight.device, scorer.backend))
        whole = not watched(module, activation, *rows, *columns)
        if whole:
            modules: Any = (rows[0], rows[1], columns[0])
            gate, up, down = (targets[m][0] for m in modules)
            mlp = GatedMlp(gate, up, down, modules, formula, scorer, columns[0] is residual)
            block = _block(parts, single, targets, mlp)
            if block is not None:
                return [(layer, BlockForward(block)), *((m, handed_out(block, m)) for m in block.projections)]
            replacements.append((module, gated_forward(mlp)))
        elif "forward" not in vars(module):
            replacements.append((module, _gated(rows[0], rows[1], columns[0], formula)))
    for name in entry.norms:
        replacements += _norm(parts[name], weight.dtype, scorer.backend)
    for linear in single if whole else [*single, *rows, *columns]:
        replacements.append((linear, scored_forward(linear, targets[linear], scorer, linear is residual)))
    return replacements


def _with_experts(
    parts: _Parts,
    targets: Targets,
    stacks: Mapping[nn.Module, Mapping[tuple[str, int], tuple[Target, ...]]],
    scorer: Scorer,
) -> Replacements:
    """A layer whose MLP is experts and their router."""
    names: Any = parts.entry.experts
    single = parts.projections()
    replacements: Replacements = []
    for name in parts.entry.norms:
        replacements += _norm(parts[name], single[0].weight.dtype, scorer.backend)
    for linear in single:
        replacements.append((linear, scored_forward(linear, targets[linear], scorer, False)))
    router = parts[names.router]
    if router in targets:
        product = SimpleNamespace(weight=router.weight, bias=None)
        replacements.append((router, router_forward(router, scored_forward(product, targets[router], scorer, False))))
    for module, by_matrix in stacks.items():
        scored = {key: scored_rows(scorer, of) for key, of in by_matrix.items()}
        replacements.append((module, experts_forward(module, names, scored, len(scorer.offsets) - 1)))
    return replacements


def _block(parts: _Parts, single: Sequence[Any], targets: Targets, mlp: GatedMlp) -> Block | None:
    """The layer as one node, where it is of a class known to be built so, and nobody watches its parts."""
    entry, layer = parts.entry, parts.layer
    if f"{type(layer).__module__}.{type(layer).__name__}" not in entry.blocks:
        return None
    attention = parts[entry.attention.module]
    norms = [parts[name] for name in entry.norms]
    if len(norms) != 2 or watched(layer, attention, *norms, *attention.children()):
        return None
    weight = single[0].weight
    on_device = usable(weight.device, mlp.scorer.backend)
    first, second = (norm_formula(norm, weight.dtype, on_device) for norm in norms)
    found: Any = tuple(targets[m][0] for m in single)
    cublas = getattr(getattr(attention, "config", None), "_attn_implementation", None) != "sdpa"
    flash = None
    if on_device and f"{type(attention).__module__}.{type(attention).__name__}" in entry.attention.plain:
        flash = flash_attention(attention, mlp.scorer.strict, mlp.scorer.chosen)
    projections: Any = tuple(single)
    return Block(attention, projections, found, (first, second), mlp, mlp.scorer, flash, cublas)


def _norm(norm: nn.Module, dtype: torch.dtype, backend: str | None) -> Replacements:
    if "forward" in vars(norm):
        return []
    device = next(norm.parameters()).device
    return [(norm, _recomputed(norm_formula(norm, dtype, usable(device, backend))))]


def _recomputed(formula: recompute.Formula) -> Callable:
    return lambda hidden: recompute.apply(formula, hidden)


def _gated(gate: nn.Module, up: nn.Module, down: nn.Module, formula: recompute.Formula) -> Callable:
    return lambda hidden: down(recompute.apply(formula, gate(hidden), up(hidden)))

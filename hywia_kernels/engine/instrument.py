"""What stands in for the forwards of a model's modules during the fused passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .. import arch
from ..arch.views import parameter_of
from ..types import Group
from . import recompute
from .block import Block, BlockForward, handed_out, no_cache
from .dispatched import entering_device
from .experts import experts_forward, router_forward
from .flash import flash_attention
from .gated import GatedMlp, gated_forward, hooks_of, watched
from .kernels import gate_formula, norm_formula, usable
from .linear import Scorer, Target, scored_forward, scored_rows

__all__ = ["instrument", "instrument_layer"]

Replacements = list[tuple[nn.Module, Any]]
Targets = dict[nn.Module, tuple[Target, ...]]  # of each module's matrices
Stacks = dict[nn.Module, dict[tuple[str, int], tuple[Target, ...]]]  # of each stacked parameter's


def instrument(
    model: Any, modules: Mapping[str, Any], groups: Sequence[Group], scorer: Scorer
) -> tuple[Replacements, bool]:
    """Makes the forwards of a fused pass: linear layers score in backward, and the outputs of norms and gates are not
    kept.

    A module whose `forward` somebody else has replaced keeps it, except for the linear layers, which must score. What a
    layer that runs as one node needs is made when it is first called, while the device works on the layers before it.

    Args:
        modules: all of the model's, by name.
        groups: whose matrices are scored.

    Returns:
        Replacements for `patches.forward_replaced`, and whether everything that needs torch's deterministic kernels
        asks for them itself, so that the pass as a whole need not.
    """
    entry = arch.architecture(model)
    by_layer: dict[int, list[Group]] = {}
    for group in groups:
        by_layer.setdefault(group.layer, []).append(group)
    replacements: Replacements = []
    asked = True
    for i, layer in enumerate(modules[entry.layers]):
        of_layer, asks = _of_layer(entry, modules, i, layer, by_layer.get(i, []), scorer)
        replacements += of_layer
        asked &= asks
    if entry.final_norm is not None:
        replacements += _norm(modules[entry.final_norm], model.dtype, scorer.backend)
    return replacements, asked


def instrument_layer(
    model: Any, modules: Mapping[str, Any], layer: int, groups: Sequence[Group], scorer: Scorer
) -> tuple[Replacements, bool]:
    """What `instrument` gives for one decoder layer, by its index, whose `groups` these are; the weights of the others
    need not be there."""
    entry = arch.architecture(model)
    return _of_layer(entry, modules, layer, modules[entry.layers][layer], groups, scorer)


def _of_layer(
    entry: arch.Architecture,
    modules: Mapping[str, Any],
    index: int,
    layer: nn.Module,
    groups: Sequence[Group],
    scorer: Scorer,
) -> tuple[Replacements, bool]:
    parts = _Parts(layer, entry, modules, f"{entry.layers}.{index}.", groups, scorer)
    if _is_block(parts):
        forward = BlockForward(parts.block, entering_device(layer))
        asks = parts.implementation() in ("eager", "sdpa")  # another may call cuBLAS in between
        return [(layer, forward), *((m, handed_out(forward, m)) for m in parts.projections())], asks
    targets, stacks = parts.targets()
    return _with_experts(parts, targets, stacks) if stacks else _in_layer(parts, targets), False


@dataclass(frozen=True)
class _Parts:
    """A decoder layer, and its modules by their names in the architecture's entry. They are looked up among the model's
    modules, since walking down from the layer would take longer."""

    layer: nn.Module
    entry: arch.Architecture
    modules: Mapping[str, Any]
    prefix: str
    groups: Sequence[Group]
    scorer: Scorer

    def __getitem__(self, name: str) -> Any:
        return self.modules[self.prefix + name]

    def several(self, names: Sequence[str]) -> list[Any]:
        """The named modules, each once: one that holds several matrices is named several times."""
        return [self[name] for name in dict.fromkeys(names)]

    def projections(self) -> list[Any]:
        names = self.entry.attention
        return self.several((names.query, names.key, names.value, names.output))

    def scored(self, targets: Targets) -> list[nn.Module]:
        """All linear layers that are scored, of an entry by which a layer may lack some and have others."""
        router = self.entry.experts.router if self.entry.experts is not None else ""
        return [m for m in targets if not router or m is not self.modules.get(self.prefix + router)]

    def mlp(self) -> tuple[Any, ...]:
        """Gate, up and down of a gated MLP."""
        return (*self.several(self.entry.mlp.rows), *self.several(self.entry.mlp.columns))

    def gated(self) -> tuple[Any, Any]:
        """The gated MLP's own module, and its activation."""
        assert self.entry.mlp.gated is not None
        return self[self.entry.mlp.gated.module], self[self.entry.mlp.gated.activation]

    def implementation(self) -> str | None:
        """Which of transformers' attention functions runs."""
        return getattr(getattr(self[self.entry.attention.module], "config", None), "_attn_implementation", None)

    def residual(self) -> Any:
        """The matrix whose output is only added to what leaves the layer."""
        module = None if self.entry.residual is None else self[self.entry.residual]
        # A hook may compute something from the output's values, so they must be there.
        return None if module is not None and module._forward_hooks else module

    def targets(self) -> tuple[Targets, Stacks]:
        targets: Targets = {}
        experts: Stacks = {}
        results = self.scorer.results
        for matrix in arch.matrices(self.modules, self.groups):
            module = self.modules[matrix.module]
            stored = module._parameters[matrix.parameter]
            for group, i in matrix.members:
                member = group.members[i]
                weight = arch.view(self.modules, member, group.units).detach()
                alone = weight.shape == stored.shape[-2:]
                outputs = None if alone else slice(member.start, member.start + group.units * member.group_size)
                results_of = results.sums(group.name), results.coarse[group.name][i]
                target = Target(member, weight, *results_of, outputs, matrix.transposed)
                if matrix.index is None:
                    targets[module] = _with(targets.get(module, ()), target)
                else:
                    of_module = experts.setdefault(module, {})
                    key = matrix.parameter, matrix.index
                    of_module[key] = _with(of_module.get(key, ()), target)
        return targets, experts

    def gated_mlp(self, targets: Targets) -> GatedMlp:
        modules: Any = self.mlp()
        gate, up, down = (targets[m][0] for m in modules)
        formula = gate_formula(self.gated()[1], usable(modules[2].weight.device, self.scorer.backend))
        return GatedMlp(gate, up, down, modules, formula, self.scorer, modules[2] is self.residual())

    def block(self) -> Block:
        targets, _ = self.targets()
        names, scorer = self.entry.attention, self.scorer
        attention, projections = self[names.module], self.projections()
        weight = projections[0].weight
        on_device = usable(weight.device, scorer.backend)
        norms: Any = tuple(norm_formula(self[name], weight.dtype, on_device) for name in self.entry.norms)
        scored: Any = tuple(targets[m][0] for m in projections)
        flash = None
        if on_device and _name(attention) in names.plain:
            flash = flash_attention(attention, scorer.strict, scorer.chosen)
        linears: Any = tuple(projections)
        strict = scorer.strict and self.implementation() != "eager"  # whose products and sums have one order anyway
        absent = no_cache(attention.__class__)
        return Block(attention, linears, scored, norms, self.gated_mlp(targets), scorer, flash, absent, strict)


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _is_block(parts: _Parts) -> bool:
    """Whether the layer is of a class known to be built as one node can be, and nobody watches its parts."""
    entry, layer = parts.entry, parts.layer
    if _name(layer) not in entry.blocks or len(entry.norms) != 2 or entry.mlp.gated is None:
        return False
    attention = parts[entry.attention.module]
    norms = (parts[name] for name in entry.norms)
    # What accelerate does at the layer's door, the node does too; inside, `run_plainly` has taken it off.
    door = [] if entering_device(layer) is not None and not hooks_of(layer) else [layer]
    return not watched(*door, attention, *norms, *attention.children(), *parts.gated(), *parts.mlp())


def _with(targets: tuple[Target, ...], new: Target) -> tuple[Target, ...]:
    """`targets` and one more. A matrix that is among them already becomes the `also` of the target that came first,
    because the layer brings the operands in the form that serves that one's axis."""
    for i, known in enumerate(targets):
        if known.outputs == new.outputs:
            return (*targets[:i], replace(known, also=replace(new, also=known.also)), *targets[i + 1 :])
    return (*targets, new)


def _in_layer(parts: _Parts, targets: Targets) -> Replacements:
    """Replacements for a layer that runs module by module; a gated MLP that nobody watches still runs as one node."""
    entry, scorer = parts.entry, parts.scorer
    if entry.partial:
        return _partial(parts, targets)
    residual = parts.residual()
    single, rows, columns = parts.projections(), parts.several(entry.mlp.rows), parts.several(entry.mlp.columns)
    weight: Any = columns[0].weight
    replacements: Replacements = []
    one_node = False  # the MLP's matrices are scored by its own node
    if entry.mlp.gated is not None:
        module, activation = parts.gated()
        one_node = not watched(module, activation, *rows, *columns)
        if one_node:
            replacements.append((module, gated_forward(parts.gated_mlp(targets))))
        elif "forward" not in vars(module):
            formula = gate_formula(activation, usable(weight.device, scorer.backend))
            replacements.append((module, _gated(rows[0], rows[1], columns[0], formula)))
    for name in entry.norms:
        replacements += _norm(parts[name], weight.dtype, scorer.backend)
    for linear in single if one_node else [*single, *rows, *columns]:
        replacements.append((linear, scored_forward(linear, targets[linear], scorer, linear is residual)))
    return replacements


def _partial(parts: _Parts, targets: Targets) -> Replacements:
    """Replacements for a layer of which only some parts are described; a gated MLP that nobody watches is one node."""
    entry, scorer = parts.entry, parts.scorer
    replacements: Replacements = []
    rest = parts.scored(targets)
    if entry.mlp.gated is not None and parts.prefix + entry.mlp.columns[0] in parts.modules:
        module, activation = parts.gated()
        mlp = parts.mlp()
        if all(m in targets for m in mlp) and not watched(module, activation, *mlp):
            replacements.append((module, gated_forward(parts.gated_mlp(targets))))
            rest = [m for m in rest if m not in mlp]
    return replacements + [(m, scored_forward(m, targets[m], scorer, False)) for m in rest]


def _with_experts(parts: _Parts, targets: Targets, stacks: Stacks) -> Replacements:
    """Replacements for a layer whose MLP consists of experts and their router."""
    names: Any = parts.entry.experts
    scorer, single = parts.scorer, parts.scored(targets) if parts.entry.partial else parts.projections()
    replacements: Replacements = []
    for name in parts.entry.norms:
        replacements += _norm(parts[name], parameter_of(single[0], "weight").dtype, scorer.backend)
    for linear in single:
        replacements.append((linear, scored_forward(linear, targets[linear], scorer, False)))
    router = parts[names.router] if names.router else None
    if router in targets:
        product = SimpleNamespace(weight=router.weight, bias=None)
        replacements.append((router, router_forward(router, scored_forward(product, targets[router], scorer, False))))
    for module, by_matrix in stacks.items():
        scored = {key: scored_rows(scorer, of) for key, of in by_matrix.items()}
        replacements.append((module, experts_forward(module, names, scored, len(scorer.offsets) - 1)))
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

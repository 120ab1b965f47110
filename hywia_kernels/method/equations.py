"""The equations by which a matrix of a changed model takes over what the removed units sent on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import arch
from ..engine.patches import forward_replaced
from ..types import Group, Plan, channels_of_gone_experts
from .compaction import unit_entries
from .layer_runs import seen
from .layer_targets import LayerTarget, Run
from .moments import TINY, add_products, added_to_diagonal, cholesky_factor, energy, zero_moments

__all__ = ["Begun", "Matrix", "NormalEquations", "can_hold", "equations_of", "matrices_of"]

# What enters a layer's last matrix is held for all of the text, so that the layer need not run again with the matrix
# solved, where that takes no more than this share of the weights' bytes, or so many bytes.
_HELD, _HELD_BYTES = 0.25, 256 << 20


@dataclass
class Matrix:
    """One matrix to refit: which inputs stay."""

    module: nn.Module
    name: str
    weight: Tensor  # [outputs, inputs], shares the parameter's memory
    bias: Tensor | None
    kept: Tensor  # int64, ascending, on its device
    additive: bool  # its output is only added to what leaves the layer
    expert: Group | None = None  # of whose channels it is, where it is one of a stack

    def of_kept(self, inputs: Tensor) -> Tensor:
        """The matrix of the inputs that stay, `[..., kept]`."""
        return functional.linear(inputs, self.weight.index_select(1, self.kept), self.bias)

    def nothing(self, inputs: Tensor) -> Tensor:
        """Zeros in the place of the module's output."""
        return inputs.new_zeros(()).expand(*inputs.shape[:-1], len(self.weight))


class NormalEquations:
    """`Σ w·x xᵀ` and `Σ w·r xᵀ` of a weighted regression of residuals `r` on inputs `x`, added up chunk by chunk.

    In float64, of products nearly as exact as float32's. A matrix with a bias has a constant input at the end.
    """

    def __init__(self, name: str, inputs: int, outputs: int, device: torch.device) -> None:
        self.name = name
        self.gram = zero_moments(inputs, inputs, device)
        self.cross = zero_moments(inputs, outputs, device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)
        self.target = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, residual: Tensor, target: Tensor, weight: Tensor) -> None:
        """`residual` and `weight` are float32; `target`: weighted energy of what the matrix gives in the dense model, a
        float64 number. The weights go to the factor that is float32 anyway, so that `x` stays as narrow as it is."""
        add_products(self.gram, x * weight[:, None], x)
        add_products(self.cross, x, residual * weight[:, None])
        self.energy += energy(residual, weight)
        self.target += target.to(self.target.device)

    def solve(self, ridge: float) -> tuple[Tensor, float, float]:
        """`(change of the weight [inputs, outputs], relative squared error before, and after)`, in float64.

        Raises:
            HywiaError: activations that are NaN or Inf, or equations without a solution.
        """
        gram, cross = self.gram, self.cross
        change = torch.cholesky_solve(cross, cholesky_factor(gram, ridge, self.name))
        # Since (G + λ) Δ = C, what Δᵀ G Δ adds is Δᵀ C less λ |Δ|², which spares the product with G.
        added = added_to_diagonal(gram, ridge)
        after = self.energy - (change * cross).sum() - added * change.square().sum()
        scale = self.target.clamp(min=TINY)
        return change, float(self.energy / scale), float(after / scale)


def matrices_of(model: Any, plan: Plan, groups: Sequence[Group], *, before_gap: bool) -> list[Matrix]:
    """The matrices through which the removed units sent their output on, in the order of the forward pass; and the one
    that sends on what leaves the layer, where layers behind it go, whose part it can take over (`before_gap`).

    Matrices of stacked experts come one by one: each sees only the tokens that are sent to it.
    """
    entry = arch.architecture(model)
    residual = None if entry.residual is None else f"{entry.layers}.{groups[0].layer}.{entry.residual}"
    chosen = []
    gone = channels_of_gone_experts(groups, plan.keep)
    for group in groups:
        member, keep = group.members[-1], plan.keep[group.name]
        if group.kind == "experts" or group.name in gone:
            continue
        if keep.numel() == group.units and not (before_gap and member.module == residual):
            continue
        module = model.get_submodule(member.module)
        weight = arch.view(model, member, group.units)
        weight = weight if member.axis == 1 else weight.T  # transformers' Conv1D stores [in, out]
        kept = unit_entries(keep, member.group_size).to(weight.device)
        if member.index is not None:
            name = f"{member.module}.{member.parameter}.{member.index}"
            chosen.append(Matrix(module, name, weight, None, kept, False, group))
            continue
        chosen.append(Matrix(module, member.module, weight, module.bias, kept, member.module == residual))
    return chosen


@dataclass
class Begun:
    """One run of samples through a layer but for the matrix that sends on what leaves it: what leaves without that
    matrix, and what it gets of the inputs that stay."""

    rest: Tensor  # [samples, tokens, outputs]
    inputs: Tensor  # [samples, tokens, kept]

    def ended(self, matrix: Matrix) -> Tensor:
        """What leaves the layer."""
        return self.rest + matrix.of_kept(self.inputs)


def equations_of(
    layer: nn.Module, index: int, matrix: Matrix, runs: Sequence[Run], targets: Sequence[LayerTarget], hold: bool
) -> tuple[NormalEquations, list[Begun]]:
    """Normal equations of one matrix: the pruned model's inputs against what the dense one has and it lacks.

    The layer runs no further than the matrix where what leaves the layer is not asked for, and what the dense layer has
    there is given up. Where it is, the layer runs without the matrix's own product.

    Args:
        hold: give what is needed to end the layer without running it again, in the place of the hidden states that
            entered it, which are given up; goes with the layer's last matrix alone.
    """
    bias = matrix.bias is not None
    normal = NormalEquations(matrix.name, matrix.kept.numel() + bias, len(matrix.weight), matrix.weight.device)
    begun: list[Begun] = []
    for run, goal in zip(runs, targets, strict=True):
        whole = goal.include_drift and matrix.additive
        out = run.pruned
        silent = forward_replaced([(matrix.module, matrix.nothing)] if whole else [])
        with silent, seen([matrix.module], stop=not whole) as at:
            out = run.calls[index](layer, run.pruned)
        x, got = at[matrix.module]
        if x.shape[-1] != matrix.kept.numel():  # else the layer computes no other inputs
            x = x.index_select(-1, matrix.kept)
        if whole:  # all that the dense layer sends on, less what this one sends on beside the matrix, and with it
            missing = goal.out.float() - out.float() - matrix.of_kept(x).float()
        else:
            missing = goal.outputs.pop(matrix.module).float() - got.float()
            if goal.include_drift:
                missing = missing + (run.dense.float() - run.pruned.float())
        if hold:
            begun.append(Begun(out, x))
            run.pruned = run.dense = out
        x = run.flat(x)
        if bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        normal.add(x, run.flat(missing), goal.energies[matrix.module], goal.weight)
    return normal, begun


def can_hold(inputs: int, weights: int) -> bool:
    """Whether what enters a layer's last matrix, so many bytes for all of the text, is held beside weights of so many
    bytes. It goes by sizes alone, so that a run repeats."""
    return inputs <= max(_HELD * weights, _HELD_BYTES)

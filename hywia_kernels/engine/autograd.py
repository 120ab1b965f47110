"""The reference pass: plain autograd, and per-sample gradients of one matrix at a time.

The decoder's linear layers get a custom backward: the input gradient as usual, and, instead of a weight gradient left
in `.grad`, per-sample gradients of this one matrix that are scored and freed before the next matrix's turn. At any time
one matrix has a gradient and a square accumulator; nothing else in the model asks for gradients. In "lean" mode whole
decoder layers are computed again in backward, by torch's own checkpointing; nothing else is. The fused passes are
tested against this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .. import arch, ops
from ..progress import Bar
from ..settings import ORDERS
from ..types import Group, Member
from .experts import experts_forward, router_forward, whole_experts
from .patches import forward_replaced
from .results import Results
from .samples import Samples
from .whole import run as run_whole

__all__ = ["run"]


class Sink:
    """Scores one matrix when its output gradient arrives."""

    def __init__(self, matrix: arch.Matrix, results: Results, scale: float, backend: str | None, bar: Bar) -> None:
        self.transposed = matrix.transposed
        self.parts = [
            (g.members[i], g.units, results.fine[g.name], results.coarse[g.name][i]) for g, i in matrix.members
        ]
        self.scale, self.backend, self.bar = scale, backend, bar

    def __call__(self, weight: Tensor, grad_output: Tensor, inputs: Tensor, offsets: Sequence[int]) -> None:
        """Scores `weight` by the gradient `[tokens, out]` at its output and its input `[tokens, in]`.

        Sample `s` is the rows from `offsets[s]` to `offsets[s + 1]`.
        """
        mean = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        fisher = torch.zeros_like(mean)
        gradient = torch.empty_like(mean)
        left, right = (inputs, grad_output) if self.transposed else (grad_output, inputs)
        samples = len(offsets) - 1
        for s in range(samples):
            rows = slice(offsets[s], offsets[s + 1])
            if rows.start == rows.stop:
                continue  # an expert that no token of the sample went to
            torch.mm(left[rows].float().t(), right[rows].float(), out=gradient)
            gradient /= self.scale
            for member, units, _, coarse in self.parts:
                signed = ops.taylor_importance(
                    _part(weight, member, units),
                    _part(gradient, member, units),
                    axis=member.axis,
                    group_size=member.group_size,
                    backend=self.backend,
                ).signed
                coarse[s].copy_(signed)
            mean += gradient
            fisher.addcmul_(gradient, gradient)
        mean /= samples
        fisher /= samples
        for member, units, fines, _ in self.parts:
            for fine, order in zip(fines, ORDERS, strict=True):
                ops.taylor_importance(
                    _part(weight, member, units),
                    _part(mean, member, units),
                    _part(fisher, member, units),
                    axis=member.axis,
                    order=order,
                    group_size=member.group_size,
                    out=(fine, torch.zeros_like(fine)),
                    backend=self.backend,
                )
        self.bar.step()


def _part(whole: Tensor, member: Member, units: int) -> Tensor:
    return whole.narrow(member.axis, member.start, units * member.group_size)


class _ScoredLinear(torch.autograd.Function):
    """`functional.linear` whose backward hands (weight, grad_output, input) to a sink instead of making a weight
    gradient."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, sink: Sink, offsets: Tensor | Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.sink, ctx.offsets = sink, offsets
        return functional.linear(inputs, weight.t() if sink.transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        inputs, weight = ctx.saved_tensors
        offsets = ctx.offsets.tolist() if isinstance(ctx.offsets, Tensor) else ctx.offsets
        # Some layers flatten samples and tokens first.
        ctx.sink(weight, grad_output.flatten(0, -2), inputs.flatten(0, -2), offsets)
        return grad_output @ (weight.t() if ctx.sink.transposed else weight), None, None, None, None


def _scored_forward(linear: Any, sink: Sink, offsets: Sequence[int]):
    return lambda inputs: _ScoredLinear.apply(inputs, linear.weight, linear.bias, sink, offsets)


def _replacements(
    model: Any, groups: tuple[Group, ...], samples: Samples, sink: Callable[[arch.Matrix], Sink]
) -> list[tuple[nn.Module, Any]]:
    names: Any = arch.architecture(model).experts
    offsets = list(range(0, samples.tokens.numel() + 1, samples.longest))
    experts: dict[str, dict[tuple[str, int], Callable]] = {}
    replacements: list[tuple[nn.Module, Any]] = []
    for matrix in arch.matrices(model, groups):
        module, one = model.get_submodule(matrix.module), sink(matrix)
        if matrix.index is not None:
            experts.setdefault(matrix.module, {})[matrix.parameter, matrix.index] = (
                lambda inputs, weight, offsets, one=one: _ScoredLinear.apply(inputs, weight, None, one, offsets)
            )
        elif any(group.kind == "experts" for group, _ in matrix.members):
            scored = lambda inputs, module=module, one=one: _ScoredLinear.apply(  # noqa: E731
                inputs, module.weight, None, one, offsets
            )
            replacements.append((module, router_forward(module, scored)))
        else:
            replacements.append((module, _scored_forward(module, one, offsets)))
    for name, scored_by_matrix in experts.items():
        module = model.get_submodule(name)
        replacements.append((module, experts_forward(module, names, scored_by_matrix, len(samples))))
    return replacements


def _checkpointed_forward(layer: nn.Module):
    forward = layer.forward
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def run(
    model: Any,
    layers: nn.ModuleList,
    groups: tuple[Group, ...],
    samples: Samples,
    results: Results,
    scale: float,
    backend: str | None,
    bar: Bar,
    lean: bool,
) -> Tensor:
    """Runs forward and backward of `scale · Σ_s L_s`, adds the scores to `results`, and returns `Σ_s L_s`.

    Args:
        lean: checkpoint every decoder layer, so that its activations are computed again in backward.
    """
    replacements = _replacements(model, groups, samples, lambda matrix: Sink(matrix, results, scale, backend, bar))
    if lean:
        replacements += [(layer, _checkpointed_forward(layer)) for layer in layers]
    with forward_replaced(replacements):
        total = run_whole(model, samples, scale)
    whole_experts(results.fine, results.coarse, groups)
    return total

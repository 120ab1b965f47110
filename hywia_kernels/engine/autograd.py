"""The reference pass: plain autograd, and per-sample gradients of one matrix at a time.

The decoder's linear layers get a custom backward: the input gradient as usual, and, instead of a weight gradient left
in `.grad`, per-sample gradients of this one matrix that are scored and freed before the next matrix's turn. At any time
one matrix has a gradient and a square accumulator; nothing else in the model asks for gradients. Nothing is computed
again but whole layers, and those by torch's own checkpointing. The fused passes are tested against this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..ops.checks import ORDERS
from ..progress import Bar
from ..types import Group, Member
from .patches import forward_replaced
from .results import Results
from .samples import Samples
from .whole import run as run_whole

__all__ = ["run"]


class Sink:
    """Scores one matrix when its output gradient arrives."""

    def __init__(self, group: Group, index: int, results: Results, scale: float, backend: str | None, bar: Bar) -> None:
        self.group, self.member, self.results = group.name, group.members[index], results
        self.fine, self.coarse = results.fine[group.name], results.coarse[group.name][index]
        self.scale, self.backend, self.bar = scale, backend, bar

    def __call__(self, weight: Tensor, grad_output: Tensor, inputs: Tensor) -> None:
        member: Member = self.member
        mean = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        fisher = torch.zeros_like(mean)
        gradient = torch.empty_like(mean)
        samples = grad_output.shape[0]
        for s in range(samples):
            torch.mm(grad_output[s].float().t(), inputs[s].float(), out=gradient)
            gradient /= self.scale
            signed = ops.taylor_importance(
                weight, gradient, axis=member.axis, group_size=member.group_size, backend=self.backend
            ).signed
            self.coarse[s].copy_(signed)
            mean += gradient
            fisher.addcmul_(gradient, gradient)
        mean /= samples
        fisher /= samples
        for fine, order in zip(self.fine, ORDERS, strict=True):
            ops.taylor_importance(
                weight,
                mean,
                fisher,
                axis=member.axis,
                order=order,
                group_size=member.group_size,
                out=(fine, torch.zeros_like(fine)),
                backend=self.backend,
            )
        self.bar.step()


class _ScoredLinear(torch.autograd.Function):
    """`functional.linear` whose backward hands (weight, grad_output, input) to a sink instead of making a weight
    gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, sink: Sink) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.sink = sink
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_output,) = grads
        inputs, weight = ctx.saved_tensors
        ctx.sink(weight, grad_output, inputs)
        return grad_output @ weight, None, None, None


def _scored_forward(linear: Any, sink: Sink):
    return lambda inputs: _ScoredLinear.apply(inputs, linear.weight, linear.bias, sink)


def _checkpointed_forward(layer: nn.Module):
    forward = layer.forward
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def run(
    model: Any,
    layers: nn.ModuleList,
    linears: Mapping[str, nn.Linear],
    found: Sequence[Group],
    samples: Samples,
    results: Results,
    scale: float,
    backend: str | None,
    bar: Bar,
    lean: bool,
) -> Tensor:
    """Forward and backward of `scale · Σ_s L_s`, into the results; `Σ_s L_s`. `lean` checkpoints decoder layers."""
    replacements: list[tuple[nn.Module, Any]] = []
    for group in found:
        for index, member in enumerate(group.members):
            linear = linears[member.module]
            replacements.append((linear, _scored_forward(linear, Sink(group, index, results, scale, backend, bar))))
    if lean:
        replacements += [(layer, _checkpointed_forward(layer)) for layer in layers]
    with forward_replaced(replacements):
        return run_whole(model, samples, scale)

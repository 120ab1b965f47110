"""A gated MLP as one node of the graph: `down(activation(gate(x)) · up(x))`.

It keeps the outputs of gate and up only, and is one node where the modules one by one are four. It serves MLPs whose
modules nobody watches, since hooks would not be called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from . import recompute
from .linear import Scorer, Target

__all__ = ["GatedMlp", "gated_forward", "hooks_of", "watched"]


@dataclass(frozen=True)
class GatedMlp:
    """One MLP: its matrices' targets, its modules gate, up and down, and the formula of `activation(gate) · up`."""

    gate: Target
    up: Target
    down: Target
    modules: tuple[nn.Linear, nn.Linear, nn.Linear]
    formula: recompute.Formula
    scorer: Scorer
    skippable: bool  # see `linear.scored_forward`

    @property
    def skips(self) -> bool:
        """Whether nobody reads the output now, because the layer is run again for the sake of its backward."""
        return self.skippable and self.scorer.replaying


def watched(*modules: nn.Module) -> bool:
    """Whether a module has hooks, or a `forward` of its own that somebody gave it."""
    for module in modules:
        own = vars(module)
        if "forward" in own or hooks_of(module):
            return True
    return False


def hooks_of(module: nn.Module) -> bool:
    """Whether a module has torch's hooks of any kind."""
    own = vars(module)
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
    return bool(hooks or own.get("_backward_pre_hooks"))


def mlp_forward(mlp: GatedMlp, inputs: Tensor, skip: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """Returns `(output, gate, up)`; the output is None with `skip`."""
    gate, up, down = mlp.modules
    g = functional.linear(inputs, gate.weight, gate.bias)
    u = functional.linear(inputs, up.weight, up.bias)
    return None if skip else functional.linear(mlp.formula.forward(g, u), down.weight, down.bias), g, u


def mlp_backward(mlp: GatedMlp, grad_output: Tensor, g: Tensor, u: Tensor, inputs: Callable[[], Tensor]) -> Tensor:
    """Scores the three matrices and returns the gradient at the MLP's input. `inputs` makes that input again when it is
    needed; `g` and `u` are the outputs of gate and up."""
    dh = grad_output @ mlp.down.weight
    mlp.scorer(mlp.down, grad_output, mlp.formula.forward(g, u), dh)
    dg, du = mlp.formula.backward(dh, g, u, private=True)
    del dh
    operand = inputs()
    gate, up, _ = mlp.modules
    mapped = (x if module.bias is None else None for x, module in ((u, up), (g, gate)))
    mlp.scorer.together(operand, list(zip((mlp.up, mlp.gate), (du, dg), mapped, strict=True)))
    del operand
    # Each product is rounded by itself, as the modules one by one do. Accumulating in the second product would hardly
    # be faster, and in low precision it would differ from the model's own backward.
    return (dg @ mlp.gate.weight).add_(du @ mlp.up.weight)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, mlp: GatedMlp, recipe: recompute.Recipe | None, skip: bool) -> Tensor:
        output, g, u = mlp_forward(mlp, inputs, skip)
        ctx.mlp, ctx.recipe = mlp, recipe
        ctx.save_for_backward(g, u, *([] if recipe is not None else [inputs]))
        if output is None:
            return inputs.new_zeros(()).expand(*inputs.shape[:-1], mlp.modules[2].weight.shape[0])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, u, *kept = ctx.saved_tensors
        inputs = ctx.recipe.take if ctx.recipe is not None else lambda: kept[0]
        return mlp_backward(ctx.mlp, grads[0], g, u, inputs), None, None, None


def gated_forward(mlp: GatedMlp) -> Callable[[Tensor], Tensor]:
    """`forward` for the MLP's module while its matrices are scored."""

    def forward(inputs: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and inputs.requires_grad):
            output = mlp_forward(mlp, inputs, False)[0]
            assert output is not None
            return output
        return _Gated.apply(inputs, mlp, recompute.recipe(inputs), mlp.skips)

    return forward

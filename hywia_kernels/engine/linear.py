"""Linear layers whose backward scores units instead of making a weight gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops import checks
from ..ops.registry import implementation
from ..progress import Bar
from ..types import Member
from . import recompute
from .results import Results
from .samples import Samples

__all__ = ["Collected", "Scorer", "Target", "scored_forward"]


@dataclass(frozen=True)
class Target:
    """One matrix and where its results go; `also`: the same matrix in another group, whose units lie along the other
    axis."""

    member: Member
    weight: Tensor
    fine: Tensor  # float32 [3, units], shared with the group's other matrices
    coarse: Tensor  # float32 [samples, units]
    also: Target | None = None


class Scorer:
    """Takes each matrix's output gradient and input when backward brings them, and adds to the results.

    No call waits for the device, and what can be checked or chosen once for all matrices of a shape is. When
    `collected` is set, tokens are kept there instead, for matrices whose samples arrive in several runs: a sum of
    absolute values and a mean of squares over all samples cannot be added run by run.
    """

    def __init__(self, results: Results, samples: Samples, scale: float, backend: str | None, bar: Bar) -> None:
        self.results, self.scale, self.backend, self.bar = results, 1.0 / scale, backend, bar
        self.offsets = samples.offsets()
        self._runs: dict[tuple, Callable[..., None]] = {}
        self.collected: Collected | None = None
        self.replaying = False  # a layer is run again for the sake of its backward
        self.strict = False  # whole layers ask for torch's deterministic kernels themselves, where it matters
        self._rows: dict[torch.device, Tensor] = {}
        self._cpu_rows: Tensor | None = None
        self.select(samples)

    def select(self, samples: Samples) -> None:
        """The samples that the next passes run on; padding is dropped before anything is scored."""
        self._rows = {}
        self._cpu_rows = samples.rows() if samples.ragged else None

    def _without_padding(self, tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1, tensor.shape[-1])
        if self._cpu_rows is None:
            return flat
        if flat.device not in self._rows:
            self._rows[flat.device] = self._cpu_rows.to(flat.device)
        return flat.index_select(0, self._rows[flat.device])

    def __call__(self, target: Target, grad_output: Tensor, inputs: Tensor, mapped: Tensor | None = None) -> None:
        """`mapped` as in `ops.linear_importance`: what the weight made of the operand that has not the units."""
        if self.collected is not None:
            self.collected.add(target, self._without_padding(grad_output), inputs, self._without_padding)
            return
        if mapped is not None:
            mapped = self._without_padding(mapped)
        self.score(target, self._without_padding(grad_output), self._without_padding(inputs), mapped)

    def score(self, target: Target, grad_output: Tensor, inputs: Tensor, mapped: Tensor | None = None) -> None:
        """All samples' tokens of one matrix, without padding: what `ops.linear_importance` does with `out=`."""
        weight, axis, size = target.weight, target.member.axis, target.member.group_size
        key: tuple = (weight.shape, weight.dtype, weight.device, axis, size)
        key += tuple((x.dtype, x.is_contiguous()) for x in (grad_output, inputs, mapped) if x is not None)
        run = self._runs.get(key)
        if run is None:
            out = (target.fine, target.coarse)
            checks.linear_importance(
                grad_output, inputs, weight, self.offsets, axis, "all", size, True, self.scale, mapped, out
            )
            run = implementation("linear_importance", self.backend, grad_output, inputs, weight, mapped)
            self._runs[key] = run
        run(
            grad_output,
            inputs,
            weight,
            self.offsets,
            axis,
            "all",
            size,
            True,
            self.scale,
            target.fine,
            target.coarse,
            True,
            mapped,
        )
        self.results.scored(target.member)
        self.bar.step()
        if target.also is not None:
            self.score(target.also, grad_output, inputs)


class Collected:
    """Output gradients and inputs of one layer's matrices, from several runs of samples, in the order of arrival.

    Matrices that are given the same tensor share one buffer. Every run must bring the matrices in the same order, as
    backward through the same layer does.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._start = self._end = 0
        self._targets: dict[str, Target] = {}
        self._grads: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}
        self._seen: list[tuple[Tensor, Tensor]] = []  # this run's inputs, and the buffers they went to

    def begin(self, tokens: int) -> None:
        """A run of so many tokens without padding follows."""
        self._start, self._end = self._end, self._end + tokens
        self._seen = []

    def _put(self, into: dict[str, Tensor], name: str, values: Tensor) -> None:
        if name not in into:
            into[name] = values.new_empty((self.tokens, values.shape[1]))
        into[name][self._start : self._end] = values

    def add(self, target: Target, grad_output: Tensor, inputs: Tensor, flatten: Callable[[Tensor], Tensor]) -> None:
        name = target.member.module
        self._targets[name] = target
        self._put(self._grads, name, grad_output)
        for tensor, buffer in self._seen:
            if tensor is inputs:
                self._inputs[name] = buffer
                return
        self._put(self._inputs, name, flatten(inputs))
        self._seen.append((inputs, self._inputs[name]))

    def score(self, scorer: Scorer) -> None:
        """Every matrix, once, over all tokens; its buffers go with it."""
        self._seen = []
        for name, target in self._targets.items():
            scorer.score(target, self._grads.pop(name), self._inputs.pop(name))


class _ScoredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        bias: Tensor | None,
        scorer: Scorer,
        target: Target,
        recipe: recompute.Recipe | None,
        skip: bool,
    ) -> Tensor:
        ctx.scorer, ctx.target, ctx.recipe = scorer, target, recipe
        if recipe is None:
            ctx.save_for_backward(inputs)
        if skip:
            shape = (*inputs.shape[:-1], target.weight.shape[0])
            return inputs.new_zeros(()).expand(shape)
        return functional.linear(inputs, target.weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        inputs = ctx.recipe.take() if ctx.recipe is not None else ctx.saved_tensors[0]
        if ctx.target.member.axis == 1:
            grad_input = grad_output @ ctx.target.weight
            ctx.scorer(ctx.target, grad_output, inputs, grad_input)
            return grad_input, None, None, None, None, None
        ctx.scorer(ctx.target, grad_output, inputs)
        del inputs  # a recomputed input goes before its gradient comes
        return grad_output @ ctx.target.weight, None, None, None, None, None


def scored_forward(linear: nn.Linear, target: Target, scorer: Scorer, skippable: bool) -> Callable[[Tensor], Tensor]:
    """`forward` for a linear layer while its matrix is scored.

    `skippable`: this output is only added to what leaves the decoder layer, so its values are not needed when the layer
    is run again for the sake of its backward, and zeros stand for them.
    """

    def forward(inputs: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and inputs.requires_grad):
            return functional.linear(inputs, linear.weight, linear.bias)
        skip = skippable and scorer.replaying
        return _ScoredLinear.apply(inputs, linear.bias, scorer, target, recompute.recipe(inputs), skip)

    return forward

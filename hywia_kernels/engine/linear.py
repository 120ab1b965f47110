"""Linear layers whose backward scores units instead of making a weight gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .. import ops
from ..ops import checks
from ..ops.calls import LinearCall
from ..ops.devices import offsets_on
from ..ops.registry import implementation
from ..progress import Bar
from ..types import Member
from . import recompute
from .results import Results
from .samples import Samples

__all__ = ["Collected", "Collector", "Scorer", "Target", "scored_forward", "scored_rows"]


@dataclass(frozen=True)
class Target:
    """One matrix, and where its scores are added.

    Attributes:
        member: the matrix as a member of its group.
        weight: the matrix itself; where a parameter holds several, this one's part of it.
        fine: float32 `[3, units]`, or `[units]` of one order alone, shared with the group's other matrices.
        coarse: float32 `[samples, units]`.
        outputs: this matrix's part of the layer's output; None for all of it.
        transposed: the weight is stored `[in, out]`, so that input and output gradient change places in the product.
        also: the same matrix in another group, whose units lie along the other axis.
    """

    member: Member
    weight: Tensor
    fine: Tensor
    coarse: Tensor
    outputs: slice | None = None
    transposed: bool = False
    also: Target | None = None


class Collector(Protocol):
    """Who keeps matrices' operands, where they are not scored as they come."""

    def add(self, target: Target, grad_output: Tensor, inputs: Tensor, flatten: Callable[[Tensor], Tensor]) -> None:
        """A matrix's operands; the output's gradient is without padding, and `flatten` takes the inputs' away."""
        ...

    def add_rows(self, target: Target, grad_output: Tensor, inputs: Tensor, offsets: Sequence[int]) -> None:
        """The operands of an expert's matrix, as `Scorer.score_some` takes them."""
        ...


def _layout(tensor: Tensor) -> tuple:
    """What a backend looks at, beside the shapes, to say whether it takes a call."""
    return tensor.dtype, tensor.stride(), tensor.data_ptr() % 16


class Scorer:
    """Takes each matrix's output gradient and input when backward brings them, and adds to the results.

    No call waits for the device, and what can be checked or chosen once for all matrices of a shape is. When
    `collected` is set, tokens are kept there instead, for matrices whose samples arrive in several runs: a sum of
    absolute values and a mean of squares over all samples cannot be added run by run.
    """

    def __init__(self, results: Results, samples: Samples, scale: float, backend: str | None, bar: Bar) -> None:
        self.results, self.scale, self.backend, self.bar = results, 1.0 / scale, backend, bar
        self.order = results.order
        self.offsets: list[int] = []
        self._runs: dict[tuple, Callable[..., None]] = {}
        self._take(samples)
        self.collected: Collector | None = None
        self.replaying = False  # True while a layer is run again for the sake of its backward
        self.strict = False  # True: layers that run as one node ask for torch's deterministic kernels where it matters
        self.chosen: dict[tuple, bool] = {}  # whether torch takes its flash kernel; see `flash`
        self._rows: dict[torch.device, Tensor] = {}
        self._cpu_rows: Tensor | None = None
        self.select(samples)

    def select(self, samples: Samples) -> None:
        """The samples that the next passes run on; padding is dropped before anything is scored."""
        self._rows = {}
        self._cpu_rows = samples.rows() if samples.ragged else None

    def _take(self, samples: Samples) -> None:
        """The samples' limits, by which backends prepare their calls."""
        offsets = samples.offsets()
        if offsets == self.offsets:
            return
        self.offsets, self._runs = offsets, {}
        if samples.ragged:  # now, while no work is queued that the copy would wait for
            for device in {sums.device for sums in self.results.fine.values() if sums.is_cuda}:
                offsets_on(device, tuple(offsets))

    def begin(self, samples: Samples) -> None:
        """What is scored from here on is of these samples, as many as before."""
        self._take(samples)
        self.select(samples)

    def _without_padding(self, tensor: Tensor) -> Tensor:
        flat = tensor.reshape(-1, tensor.shape[-1])
        if self._cpu_rows is None:
            return flat
        if flat.device not in self._rows:
            self._rows[flat.device] = self._cpu_rows.to(flat.device)
        return flat.index_select(0, self._rows[flat.device])

    def __call__(self, target: Target, grad_output: Tensor, inputs: Tensor, mapped: Tensor | None = None) -> None:
        """Scores a matrix, or keeps its tokens while they are collected. `mapped` is as in `ops.linear_importance`."""
        self.together(inputs, [(target, grad_output, mapped)])

    def together(self, inputs: Tensor, parts: Iterable[tuple[Target, Tensor, Tensor | None]]) -> None:
        """Scores matrices that are given the same input, in this order: `(target, grad_output, mapped)` of each."""
        if self.collected is not None:
            for target, grad_output, _ in parts:
                self.collected.add(target, self._without_padding(grad_output), inputs, self._without_padding)
            return
        inputs = self._without_padding(inputs)
        for target, grad_output, mapped in parts:
            kept = None if mapped is None else self._without_padding(mapped)
            self.score(target, self._without_padding(grad_output), inputs, kept)

    def score(self, target: Target, grad_output: Tensor, inputs: Tensor, mapped: Tensor | None = None) -> None:
        """Scores one matrix by all samples' tokens, without padding, as `ops.linear_importance` does with `out=`."""
        weight, axis, size = target.weight, target.member.axis, target.member.group_size
        brought = grad_output, inputs
        if target.transposed:
            grad_output, inputs = inputs, grad_output
        key = (weight.shape, weight.device, axis, size, *_layout(weight), *_layout(grad_output), *_layout(inputs))
        if mapped is not None:
            key += _layout(mapped)
        run = self._runs.get(key)
        call = LinearCall(grad_output, inputs, weight, self.offsets, axis, self.order, size, True, self.scale, mapped)
        if run is None:
            out = (target.fine, target.coarse)
            checks.linear_importance(
                grad_output, inputs, weight, self.offsets, axis, self.order, size, True, self.scale, mapped, out
            )
            run = implementation("linear_importance", self.backend, grad_output, inputs, weight, mapped)
            if hasattr(run, "prepared"):
                run = run.prepared(call)
            self._runs[key] = run
        also = target.also
        more: dict[str, Any] = {}
        if also is not None and also.also is None and getattr(run, "takes_also", False):
            more["also"] = (also.member.axis, also.member.group_size, also.fine, also.coarse)
            self.results.scored(also.member)
            self.bar.step()
        elif also is not None:
            self.score(also, *brought)
        run(call, target.fine, target.coarse, True, **more)
        self.results.scored(target.member)
        self.bar.step()

    def score_some(self, target: Target, grad_output: Tensor, inputs: Tensor, offsets: Sequence[int]) -> None:
        """Scores one expert's matrix by its tokens. Sample `s` is the rows from `offsets[s]` to `offsets[s + 1]`, and
        may be none.

        The op takes no empty samples, and its means are over the samples that it is given. A sample without tokens has
        no gradient, so it only counts in the number of samples that the sums are divided by.
        """
        if self.collected is not None:
            self.collected.add_rows(target, grad_output, inputs, offsets)
            return
        samples = len(offsets) - 1
        present = [s for s in range(samples) if offsets[s] < offsets[s + 1]]
        if target.transposed:
            grad_output, inputs = inputs, grad_output
        fine, coarse = ops.linear_importance(
            grad_output,
            inputs,
            target.weight,
            samples=[*(offsets[s] for s in present), offsets[-1]],
            axis=target.member.axis,
            order=self.order,
            group_size=target.member.group_size,
            scale=self.scale,
            backend=self.backend,
        )
        target.fine.add_(fine, alpha=len(present) / samples)
        target.coarse.index_add_(0, torch.tensor(present, device=coarse.device), coarse)
        self.bar.step()


class Collected:
    """Output gradients and inputs of one layer's matrices, from several runs of samples, in the order of arrival.

    Matrices that are given the same tensor share one buffer. Every run must bring the matrices in the same order, as
    backward through the same layer does.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._start = self._end = 0
        self._targets: dict[tuple[str, int], Target] = {}
        self._grads: dict[tuple[str, int], Tensor] = {}
        self._inputs: dict[tuple[str, int], Tensor] = {}
        self._buffers: list[tuple[Tensor, Tensor]] = []  # this run's inputs, and the buffer each went to

    def begin(self, tokens: int) -> None:
        """Begins a run of so many tokens, padding not counted."""
        self._start, self._end = self._end, self._end + tokens
        self._buffers = []

    def _put(self, into: dict[tuple[str, int], Tensor], name: tuple[str, int], values: Tensor) -> None:
        if name not in into:
            into[name] = values.new_empty((self.tokens, values.shape[1]))
        into[name][self._start : self._end] = values

    def add(self, target: Target, grad_output: Tensor, inputs: Tensor, flatten: Callable[[Tensor], Tensor]) -> None:
        name = target.member.module, target.member.start
        self._targets[name] = target
        self._put(self._grads, name, grad_output)
        for tensor, buffer in self._buffers:
            if tensor is inputs:
                self._inputs[name] = buffer
                return
        self._put(self._inputs, name, flatten(inputs))
        self._buffers.append((inputs, self._inputs[name]))

    def add_rows(self, target: Target, grad_output: Tensor, inputs: Tensor, offsets: Sequence[int]) -> None:
        raise AssertionError("a layerwise pass takes no experts")

    def score(self, scorer: Scorer) -> None:
        """Scores every matrix once over all tokens, and frees its buffers."""
        self._buffers = []
        for name, target in self._targets.items():
            scorer.score(target, self._grads.pop(name), self._inputs.pop(name))


class _ScoredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        scorer: Scorer,
        targets: tuple[Target, ...],
        recipe: recompute.Recipe | None,
        skip: bool,
    ) -> Tensor:
        ctx.scorer, ctx.targets, ctx.recipe, ctx.weight = scorer, targets, recipe, weight
        if recipe is None:
            ctx.save_for_backward(inputs)
        if skip:
            shape = (*inputs.shape[:-1], weight.shape[0])
            return inputs.new_zeros(()).expand(shape)
        return functional.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        inputs = ctx.recipe.take() if ctx.recipe is not None else ctx.saved_tensors[0]
        targets: tuple[Target, ...] = ctx.targets
        if targets[0].member.axis == (0 if targets[0].transposed else 1):
            grad_input = grad_output @ ctx.weight
            ctx.scorer(targets[0], grad_output, inputs, grad_input)
            return grad_input, None, None, None, None, None, None
        ctx.scorer.together(
            inputs,
            (
                (t, grad_output if t.outputs is None else grad_output[..., t.outputs].contiguous(), None)
                for t in targets
            ),
        )
        del inputs  # frees a recomputed input before its gradient is allocated
        return grad_output @ ctx.weight, None, None, None, None, None, None


def scored_forward(
    linear: Any, targets: tuple[Target, ...], scorer: Scorer, skippable: bool
) -> Callable[[Tensor], Tensor]:
    """`forward` for a linear layer while its matrix, or the matrices its weight holds, are scored.

    `skippable`: this output is only added to what leaves the decoder layer, so its values are not needed when the layer
    is run again for the sake of its backward, and zeros stand for them.
    """

    def forward(inputs: Tensor) -> Tensor:
        weight = linear.weight.detach()
        if targets[0].transposed:
            weight = weight.t()
        if not (torch.is_grad_enabled() and inputs.requires_grad):
            return functional.linear(inputs, weight, linear.bias)
        skip = skippable and scorer.replaying
        return _ScoredLinear.apply(inputs, linear.bias, weight, scorer, targets, recompute.recipe(inputs), skip)

    return forward


class _ScoredRows(torch.autograd.Function):
    """A product with one expert's matrix, or matrices, that scores them by sample."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, scorer: Scorer, targets: tuple[Target, ...], offsets: Tensor
    ) -> Tensor:
        weight = weight.t() if targets[0].transposed else weight
        ctx.save_for_backward(inputs, weight)
        ctx.scorer, ctx.targets, ctx.offsets = scorer, targets, offsets
        return functional.linear(inputs, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        inputs, weight = ctx.saved_tensors
        offsets = ctx.offsets.tolist()
        for target in ctx.targets:
            part = grad_output if target.outputs is None else grad_output[:, target.outputs]
            ctx.scorer.score_some(target, part.contiguous(), inputs, offsets)
        return grad_output @ weight, None, None, None, None


def scored_rows(scorer: Scorer, targets: tuple[Target, ...]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A function of `(inputs, weight, offsets of the samples among the inputs' rows)` that computes the product and
    scores it in backward; see `experts`."""
    return lambda inputs, weight, offsets: _ScoredRows.apply(inputs, weight, scorer, targets, offsets)

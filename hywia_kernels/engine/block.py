"""A decoder layer as one node of the graph: `h = x + o(attend(q(n), k(n), v(n)))`, `y = h + mlp(norm(h))`.

Here `n` is `norm(x)`. What lies between the projections (rotary embedding, norms of queries and keys, windows, sinks)
is the attention module's own code, run under autograd, or `flash`; all else is written out, forward and backward. A
layer takes a third of the host's time that the same modules take one by one, and the host is what a pass on a GPU waits
for. It serves layers without hooks and without replaced forwards: those would not be called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from ..versions import CACHES
from . import recompute
from .dispatched import moved
from .flash import FlashAttention, FlashCore
from .gated import GatedMlp, mlp_backward, mlp_forward
from .linear import Scorer, Target
from .patches import reproducible

__all__ = ["Block", "BlockForward", "Kept", "handed_out", "no_cache"]


class _Sources(torch.autograd.Function):
    """Makes tensors the beginning of a graph, which does not keep their values, as it would those of leaves."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return None, *(None for _ in grads)


@dataclass
class _Core:
    """One call of the attention between its projections: the graph of what leaves it, the edges at which the gradients
    of q, k and v come out, and the values, where they are kept."""

    graph: Tensor
    edges: tuple[GradientEdge, ...]
    value: Tensor | None
    strict: bool

    @property
    def out(self) -> Tensor:
        return self.graph.detach()

    def backward(self, grad: Tensor) -> tuple[Tensor, ...]:
        with reproducible(self.strict, cublas=False):
            return torch.autograd.grad(self.graph, self.edges, grad)


@dataclass
class Kept:
    """What a layer keeps for its backward: the attention's graph, the operands of the first and of the second norm, and
    the outputs of gate and up."""

    core: _Core | FlashCore
    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    gates: tuple[Tensor, ...]


@dataclass
class Block:
    """One layer's parts.

    While the attention's own code runs, the modules of q, k and v return what `slots` holds for them, and the output
    projection's module leaves its input in `captured`.
    """

    attention: nn.Module
    projections: tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]  # q, k, v, o
    targets: tuple[Target, Target, Target, Target]
    norms: tuple[recompute.Formula, recompute.Formula]
    mlp: GatedMlp
    scorer: Scorer
    flash: FlashAttention | None = None  # the attention's own code written out, for the calls that it serves
    absent: Mapping[str, None] = field(default_factory=dict)  # keywords for the cache that there is not
    strict: bool = False  # the attention asks for torch's deterministic kernels
    slots: dict[nn.Module, Tensor] = field(default_factory=dict)
    captured: Tensor | None = None

    def attend(self, normed: Tensor, keywords: dict[str, Any], differentiable: bool) -> _Core | FlashCore:
        """Runs the attention from the normed hidden states up to its output projection, whose input
        `[samples, tokens, heads · head_dim]` is the result's `out`."""
        made = tuple(functional.linear(normed, m.weight, m.bias) for m in self.projections[:3])
        if self.flash is not None and self.flash.serves(made, keywords):
            return self.flash.forward(made, keywords)
        edges: tuple[GradientEdge, ...] = ()
        given = made
        try:
            with torch.set_grad_enabled(differentiable):
                if differentiable:
                    anchor = normed.new_empty(0).requires_grad_()
                    given = _Sources.apply(anchor, *made)
                    edges = tuple(get_gradient_edge(m) for m in given)
                self.slots.update(zip(self.projections[:3], given, strict=True))
                # Attention is what has atomic additions in its backward, and which of its kernels runs the forward
                # depends on the mode too; all else here gives the same bits anyway.
                with reproducible(self.strict, cublas=False):
                    self.attention.forward(hidden_states=normed, **keywords, **self.absent)
            assert self.captured is not None
            # Where no head is repeated the attention kernel saves this very tensor, so keeping it takes no memory.
            value = made[2] if differentiable and made[2].shape == made[0].shape else None
            return _Core(self.captured, edges, value, self.strict)
        finally:
            self.slots.clear()
            self.captured = None

    def forward(self, x: Tensor, keywords: dict[str, Any], differentiable: bool, skip: bool) -> tuple[Tensor, Kept]:
        """Returns `y`, and what backward needs. With `skip`, `y` is `h` plus zeros nobody reads."""
        small = self.norms[0].small(x)
        core = self.attend(self.norms[0].forward(x, *small), keywords, differentiable)
        output = self.projections[3]
        h = x + functional.linear(core.out, output.weight, output.bias)
        second = self.norms[1].small(h)
        down, g, u = mlp_forward(self.mlp, self.norms[1].forward(h, *second), skip)
        y = x.new_zeros(()).expand(h.shape) if down is None else h + down
        return y, Kept(core, (x, *small), (h, *second), (g, u))

    def backward(self, dy: Tensor, kept: Kept) -> Tensor:
        """Scores every matrix and returns the gradient at `x`; sums are made in autograd's order."""
        gate, up = kept.gates
        dn = mlp_backward(self.mlp, dy, gate, up, lambda: self.norms[1].forward(*kept.second))
        dh = self.norms[1].backward(dn, *kept.second)[0].add_(dy)
        core = kept.core
        da = dh @ self.projections[3].weight
        self.scorer(self.targets[3], dh, core.out, da)
        grads = core.backward(da)
        normed = self.norms[0].forward(*kept.first)
        mapped = (None, None, core.value if self.projections[2].bias is None else None)
        del da
        backwards = (2, 1, 0)
        self.scorer.together(normed, [(self.targets[i], grads[i], mapped[i]) for i in backwards])
        total: Tensor | None = None
        for i in backwards:
            part = grads[i] @ self.projections[i].weight
            total = part if total is None else total.add_(part)
        assert total is not None
        del grads, normed, mapped
        return self.norms[0].backward(total, *kept.first)[0].add_(dh)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, keywords: dict[str, Any], skip: bool) -> Tensor:
        y, kept = block.forward(x, keywords, True, skip)
        ctx.block, ctx.core, ctx.sizes = block, kept.core, (len(kept.first), len(kept.second))
        ctx.save_for_backward(*kept.first, *kept.second, *kept.gates)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        core, ctx.core = ctx.core, None
        first, second = ctx.sizes
        saved = ctx.saved_tensors
        kept = Kept(core, saved[:first], saved[first : first + second], saved[first + second :])
        return ctx.block.backward(grads[0], kept), None, None, None


class BlockForward:
    """`forward` for the layer's module while its matrices are scored. Keyword arguments are passed on to the attention.

    A pass that runs layers one by one needs no autograd: it hands what `kept` returned with the output to `backward`.

    Args:
        make: the layer's parts. device: to which what enters is moved; None: it is there.
    """

    def __init__(self, make: Callable[[], Block], device: torch.device | None = None) -> None:
        self._make, self._device = make, device

    @cached_property
    def block(self) -> Block:
        return self._make()

    def __call__(self, hidden_states: Tensor, **keywords: Any) -> Tensor:
        hidden_states, keywords = self._entering(hidden_states, keywords)
        block = self.block
        if not (torch.is_grad_enabled() and hidden_states.requires_grad):
            return block.forward(hidden_states, keywords, False, False)[0]
        return _Block.apply(hidden_states, block, keywords, block.mlp.skips)

    @torch.no_grad()
    def kept(self, hidden_states: Tensor, **keywords: Any) -> tuple[Tensor, Kept]:
        hidden_states, keywords = self._entering(hidden_states, keywords)
        return self.block.forward(hidden_states, keywords, True, self.block.mlp.skips)

    @torch.no_grad()
    def backward(self, gradient: Tensor, kept: Kept) -> Tensor:
        return self.block.backward(gradient if self._device is None else gradient.to(self._device), kept)

    def _entering(self, hidden_states: Tensor, keywords: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        keywords = _without_cache(keywords)
        if self._device is None:
            return hidden_states, keywords
        return hidden_states.to(self._device), moved(keywords, self._device)


def _without_cache(keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords without those for a cache. A pass keeps none, and a version of transformers must not be given a
    keyword that it does not know."""
    if any(keywords.get(name) is not None for name in CACHES):
        raise AssertionError("a calibration pass keeps no cache")
    return {name: value for name, value in keywords.items() if name not in CACHES}


@cache
def no_cache(attention: type) -> Mapping[str, None]:
    """Keywords for a cache, all None, that this class of attention cannot be called without."""
    parameters = inspect.signature(inspect.unwrap(attention.forward)).parameters.values()  # type: ignore[attr-defined]
    return {p.name: None for p in parameters if p.name in CACHES and p.default is p.empty}


def handed_out(forward: BlockForward, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """`forward` for one of the projections while the attention's own code runs: q, k and v return what `Block.attend`
    computed, and the output projection notes its input."""

    def hand_out(inputs: Tensor) -> Tensor:
        block = forward.block
        if linear is not block.projections[3]:
            return block.slots[linear]
        block.captured = inputs
        return inputs  # of another width than the module's output, which nobody reads

    return hand_out

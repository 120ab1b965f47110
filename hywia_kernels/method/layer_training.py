"""A layer of a changed model trained, by itself, to send on what the dense layer does.

Least squares solves the matrices that send on; here all of a layer's weights follow, its norms too, by AdamW on

    mean over tokens of  w_t · |y_t − ỹ_t|² / n,

with `y` the `n` numbers that leave the dense layer, `ỹ` those that leave the changed one for what the changed layers
before it send, and `w_t` one over the mean square of `y_t`. Only one layer is at work at a time, so that this needs
neither a second model nor a backward through all of one, as training on predictions does.

Related work: block by block reconstruction of quantised networks (BRECQ, arXiv 2102.05426).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten

from ..engine.layered import hidden_of
from ..engine.patches import reproducible, reproducibly
from ..engine.static_driver import capture
from ..errors import HywiaError
from .layer_targets import LayerTarget, Run
from .moments import energy
from .narrow_layers import Narrow

__all__ = ["TRAINED_TOKENS", "alike_runs", "relative_error", "train_layer"]

TRAINED_TOKENS = 2048  # of a step
# The peak learning rate is the lesser of this and that over the hidden size, since weights are the smaller the more
# inputs there are: 2e-3 for SmolLM2's 576, on which it was chosen.
_RATE, _BY_SIZE = 2e-3, 1.152
_SEED = 0
# A step of a small layer is a hundred kernels that take less time than their launches, so it is replayed as one CUDA
# graph, where it is of fewer parameters than this and there are so many steps that capturing it pays.
_CAPTURED_PARAMETERS, _CAPTURED_STEPS = 50_000_000, 16


def train_layer(
    layer: nn.Module,
    index: int,
    runs: Sequence[Run],
    targets: Sequence[LayerTarget],
    passes: int,
    narrow: Sequence[Narrow] = (),
) -> tuple[list[tuple[nn.Parameter, Tensor]], list[float]]:
    """Train a layer in place, and keep what comes of it where that is nearer to the dense layer than before.

    Weights are trained in float32 copies, 16-bit ones and those on CUDA multiplied in bfloat16. What is masked stays
    zero: the rows and columns of a removed unit multiply each other's gradients. The order of the text is seeded.

    Args:
        layer: masked and solved. index: its place among the layers. runs: of the text, with what enters the layer.
        targets: what the dense layer sends on for each run. passes: over all runs, a step a run.
        narrow: its linear layers that run at their cut width, of which no more than that is trained.

    Returns:
        `(the parameters that changed, each with its new values on the host; the relative error before and after)`;
        no parameters where training brought nothing.

    Raises:
        HywiaError: the layer's output is NaN or Inf before anything is trained.
    """
    before = relative_error(layer, index, runs, targets)
    if not math.isfinite(before):
        raise HywiaError(
            f"layer {index}: expected finite hidden states, got NaN or Inf; load the model in float32 or bfloat16, and "
            "look for damaged weights"
        )
    trained = _Trained(layer, index, runs[0].pruned.shape[-1], narrow)
    untrained = {name: p.clone() for name, p in trained.parameters.items()}
    trained.train(runs, targets, passes)
    trained.write()
    after = relative_error(layer, index, runs, targets)
    if after < before:  # not so where it is NaN
        return [(p, p.detach().to("cpu", copy=True)) for p in trained.parameters.values()], [before, after]
    for name, parameter in trained.parameters.items():
        parameter.copy_(untrained[name])
    return [], [before, before]


def relative_error(layer: nn.Module, index: int, runs: Sequence[Run], targets: Sequence[LayerTarget]) -> float:
    """Mean over tokens of the squared error of what leaves a layer, relative to the dense layer's mean square."""
    total, count = 0.0, 0
    for run, goal in zip(runs, targets, strict=True):
        out = run.calls[index](layer, run.pruned)
        missing = run.flat(goal.out).float() - run.flat(out).float()
        total += float(energy(missing, goal.weight))
        count += missing.numel()
    return total / count


class _Trained:
    """Float32 copies of a layer's parameters, and their optimiser.

    Args:
        hidden: numbers that enter the layer for a token. index, narrow: as for `train_layer`.

    Attributes:
        parameters: of the layer, those that are trained, by name.
    """

    def __init__(self, layer: nn.Module, index: int, hidden: int, narrow: Sequence[Narrow]) -> None:
        self.parameters = {name: p for name, p in layer.named_parameters() if p.is_floating_point()}
        self._layer, self._index = layer, index
        leaves = {id(p): (linear, leaf) for linear in narrow for leaf, p in linear.module.named_parameters()}
        self._narrow = {name: leaves[id(p)] for name, p in self.parameters.items() if id(p) in leaves}
        self.device = next(iter(self.parameters.values())).device
        cuda = self.device.type == "cuda"
        self._mixed = any(p.dtype != torch.float32 for p in self.parameters.values()) or (
            cuda and torch.cuda.is_bf16_supported()
        )
        self._copies = {name: torch.empty_like(self._used(name), dtype=torch.float32) for name in self.parameters}
        for copy in self._copies.values():
            copy.requires_grad_()
        self._peak = min(_RATE, _BY_SIZE / hidden)
        self._rate = torch.tensor(self._peak, device=self.device)
        more: dict[str, Any] = {"fused": True, "capturable": True} if cuda else {"foreach": False}
        self._optimiser = torch.optim.AdamW(self._copies.values(), lr=self._rate, weight_decay=0.0, **more)

    def _used(self, name: str) -> Tensor:
        parameter = self.parameters[name].detach()
        if name not in self._narrow:
            return parameter
        linear, leaf = self._narrow[name]
        return linear.of(leaf, parameter)

    @torch.no_grad()
    def _begin(self) -> None:
        """The layer's own values, and an optimiser that has seen nothing."""
        for name, copy in self._copies.items():
            copy.copy_(self._used(name))
            copy.grad = None  # of a step that failed half way
        for state in self._optimiser.state.values():
            for value in state.values():
                value.zero_()

    @torch.no_grad()
    def write(self) -> None:
        """What was trained, into the layer."""
        for name, copy in self._copies.items():
            if name in self._narrow:
                linear, leaf = self._narrow[name]
                linear.put(leaf, self.parameters[name], copy.detach())
            else:
                self.parameters[name].copy_(copy)

    def train(self, runs: Sequence[Run], targets: Sequence[LayerTarget], passes: int) -> None:
        """From the layer's own values on, under deterministic kernels where all ops have them."""

        def run(strict: bool) -> None:
            self._begin()
            with reproducible(strict), torch.enable_grad():
                self._steps(runs, targets, passes)

        reproducibly(run, self.device.type == "cuda")

    def _steps(self, runs: Sequence[Run], targets: Sequence[LayerTarget], passes: int) -> None:
        generator = torch.Generator().manual_seed(_SEED + self._index)
        order = [place for _ in range(passes) for place in torch.randperm(len(runs), generator=generator).tolist()]
        alike = alike_runs(runs, self._index)
        replay = self._captured(runs[0], targets[0], len(order))
        for step, place in enumerate(order):
            self._rate.fill_(self._peak * (1.0 - step / len(order)))
            run, goal = runs[place], targets[place]
            if replay is not None and alike[place]:
                replay(run.pruned, goal.out, goal.weight)
            else:
                self._step(run, run.pruned, goal.out, goal.weight)

    def _step(self, run: Run, entered: Tensor, goal: Tensor, weight: Tensor) -> Tensor:
        call = run.calls[self._index]
        arguments: tuple[Any, ...] = (entered, *call.arguments)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._mixed, cache_enabled=False):
            out = hidden_of(functional_call(self._layer, self._copies, arguments, call.keywords))
        missing = run.flat(goal).float() - run.flat(out).float()
        loss = (missing.square().mean(1) * weight).mean()
        loss.backward()
        self._optimiser.step()
        self._optimiser.zero_grad()
        return loss.detach()

    def _captured(self, run: Run, goal: LayerTarget, steps: int) -> Callable[[Tensor, Tensor, Tensor], Any] | None:
        """A step for runs that are like this one as a CUDA graph, where that pays and can be done."""
        count = sum(copy.numel() for copy in self._copies.values())
        if self.device.type != "cuda" or count > _CAPTURED_PARAMETERS or steps < _CAPTURED_STEPS:
            return None
        held = tuple(x.clone() for x in (run.pruned, goal.out, goal.weight))
        graph: Callable[[], Tensor] | None = None
        # A layer that asks the host for something, memory that is short.
        with suppress(RuntimeError, NotImplementedError):
            graph = capture(lambda: self._step(run, *held))
        self._begin()
        if graph is None:
            return None
        found = graph

        def replay(*given: Tensor) -> None:
            for place, value in zip(held, given, strict=True):
                place.copy_(value)
            found()

        return replay


def alike_runs(runs: Sequence[Run], index: int) -> list[bool]:
    """Which runs have as much text as the first one, padded alike, and call a layer as that does."""
    one = runs[0]
    first, spec = tree_flatten((one.calls[index].arguments, one.calls[index].keywords))
    found = []
    for run in runs:
        leaves, mine = tree_flatten((run.calls[index].arguments, run.calls[index].keywords))
        text = run.pruned.shape == one.pruned.shape and _equal(run.rows, one.rows)
        found.append(text and mine == spec and all(map(_equal, first, leaves)))
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return one is other or (type(one) is type(other) and isinstance(one, (bool, int, float, str)) and one == other)

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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten

from ..engine.layered import hidden_of
from ..engine.memory import free_bytes
from ..engine.patches import reproducible, reproducibly
from ..engine.static_driver import capture
from ..errors import HywiaError
from ..ops.precision import multiplies_bfloat16
from .layer_runs import Call
from .layer_targets import LayerTarget, Run
from .moments import energy
from .narrow_layers import Narrow

__all__ = ["LayerTraining", "alike_runs", "relative_error"]

# The peak learning rate is the lesser of this and that over the hidden size, since weights are the smaller the more
# inputs there are: 3e-3 for SmolLM2's 576, on which it was chosen.
_RATE, _BY_SIZE = 3e-3, 1.728
_SEED = 0
_JUDGED_RUNS = 16  # on so many, evenly spaced, it is judged whether training has brought a layer nearer
# Launching a step's hundreds of kernels from Python takes longer than a small layer's kernels do, so it is replayed as
# one CUDA graph where there are so many steps that capturing it pays, and layers that look alike share it. Sixteen
# bytes a parameter stay with it: a layer of more than so many parameters has a graph where that is such a share of the
# free memory.
_CAPTURED_STEPS, _SMALL_PARAMETERS, _HELD_SHARE = 16, 50_000_000, 0.125
_SAME = 1e-2  # relative: losses of a graph and of a layer that are this near are of the same computation


class LayerTraining:
    """Layers of a model trained one after the other, each in place.

    Weights are trained in float32 copies, multiplied in bfloat16 where they are of 16 bits or the device is faster at
    that. What is masked stays zero: the rows and columns of a removed unit multiply each other's gradients. The order
    of the text is seeded.

    Args:
        passes: over all runs, a step a run.
    """

    def __init__(self, passes: int) -> None:
        self._passes = passes
        self._last: _Trained | None = None  # whose buffers and graph may serve the next layer too

    def train(
        self,
        layer: nn.Module,
        index: int,
        runs: Sequence[Run],
        targets: Sequence[LayerTarget],
        narrow: Sequence[Narrow] = (),
    ) -> tuple[list[nn.Parameter], list[float]]:
        """Train a layer, and keep what comes of it where that is nearer to the dense layer than before.

        Args:
            layer: masked and solved. index: its place among the layers. runs: of the text, a step each, with what
                enters the layer. targets: what the dense layer sends on for each run.
            narrow: its linear layers that run at their cut width, of which no more than that is trained.

        Returns:
            `(the parameters that changed; the relative error before and after, on some of the runs)`; no parameters
            where training brought nothing.

        Raises:
            HywiaError: the layer's output is NaN or Inf before anything is trained.
        """
        some = slice(None, None, max(1, len(runs) // _JUDGED_RUNS))
        before = relative_error(layer, index, runs[some], targets[some])
        if not math.isfinite(before):
            raise HywiaError(
                f"layer {index}: expected finite hidden states, got NaN or Inf; load the model in float32 or bfloat16, "
                "and look for damaged weights"
            )
        trained = self._of(layer, index, runs[0], narrow)
        untrained = {name: p.clone() for name, p in trained.parameters.items()}
        trained.train(runs, targets, self._passes)
        trained.write()
        self._last = trained if trained.lasts else None
        after = relative_error(layer, index, runs[some], targets[some])
        if after < before:  # not so where it is NaN
            return list(trained.parameters.values()), [before, after]
        for name, parameter in trained.parameters.items():
            parameter.copy_(untrained[name])
        return [], [before, before]

    def _of(self, layer: nn.Module, index: int, run: Run, narrow: Sequence[Narrow]) -> _Trained:
        place = _Place.of(layer, index, narrow)
        last, self._last = self._last, None
        if last is not None and last.serves(place, run):
            last.place = place
            return last
        del last
        return _Trained(place, run.pruned.shape[-1])


def relative_error(layer: nn.Module, index: int, runs: Sequence[Run], targets: Sequence[LayerTarget]) -> float:
    """Mean over tokens of the squared error of what leaves a layer, relative to the dense layer's mean square."""
    total, count = 0.0, 0
    for run, goal in zip(runs, targets, strict=True):
        out = run.calls[index](layer, run.pruned)
        missing = run.flat(goal.out).float() - run.flat(out).float()
        total += float(energy(missing, goal.weight))
        count += missing.numel()
    return total / count


@dataclass(frozen=True)
class _Place:
    """A layer and what of it is trained: parameters by name, some of them of linear layers at their cut width."""

    layer: nn.Module
    index: int
    parameters: dict[str, nn.Parameter]
    narrow: dict[str, tuple[Narrow, str]]

    @classmethod
    def of(cls, layer: nn.Module, index: int, narrow: Sequence[Narrow]) -> _Place:
        parameters = {name: p for name, p in layer.named_parameters() if p.is_floating_point()}
        leaves = {id(p): (linear, leaf) for linear in narrow for leaf, p in linear.module.named_parameters()}
        return cls(layer, index, parameters, {n: leaves[id(p)] for n, p in parameters.items() if id(p) in leaves})

    def used(self, name: str) -> Tensor:
        """What is trained of a parameter."""
        parameter = self.parameters[name].detach()
        if name not in self.narrow:
            return parameter
        linear, leaf = self.narrow[name]
        return linear.of(leaf, parameter)

    def put(self, name: str, values: Tensor) -> None:
        """Write what is trained of a parameter."""
        if name in self.narrow:
            linear, leaf = self.narrow[name]
            linear.put(leaf, self.parameters[name], values)
        else:
            self.parameters[name].copy_(values)

    def traits(self) -> list[Any]:
        """What can be seen from outside of what a step computes, but for the values that are trained and the layer's
        own place in the model."""
        modules: list[Any] = [(name, type(module), _settings(module)) for name, module in self.layer.named_modules()]
        trained = [(name, self.used(name).shape, p.dtype, p.device) for name, p in self.parameters.items()]
        return modules + trained

    def constants(self) -> dict[str, Tensor]:
        """Tensors of the layer that a step reads and that are not trained."""
        named = [*self.layer.named_buffers(), *self.layer.named_parameters()]
        return {name: value for name, value in named if name not in self.parameters}


def _settings(module: nn.Module) -> dict[str, Any]:
    plain = {k: v for k, v in vars(module).items() if v is None or isinstance(v, (bool, int, float, str))}
    return {name: value for name, value in plain.items() if not name.endswith(("idx", "index"))}


class _Trained:
    """Float32 copies of a layer's parameters, their optimiser, and a step as a CUDA graph.

    Args:
        hidden: numbers that enter the layer for a token.

    Attributes:
        place: the layer that is trained; another one that looks like it may take its place.
    """

    def __init__(self, place: _Place, hidden: int) -> None:
        self.place = place
        self.device = next(iter(place.parameters.values())).device
        cuda = self.device.type == "cuda"
        self._mixed = any(p.dtype != torch.float32 for p in place.parameters.values()) or multiplies_bfloat16(
            self.device
        )
        self._copies = {name: torch.empty_like(place.used(name), dtype=torch.float32) for name in place.parameters}
        for copy in self._copies.values():
            copy.requires_grad_()
        self._peak = min(_RATE, _BY_SIZE / hidden)
        self._rate = torch.tensor(self._peak, device=self.device)
        more: dict[str, Any] = {"fused": True, "capturable": True} if cuda else {"foreach": False}
        self._optimiser = torch.optim.AdamW(self._copies.values(), lr=self._rate, weight_decay=0.0, **more)
        self._graph: _Graph | None = None
        # Of the layer whose step is captured.
        self._traits: list[Any] = []
        self._constants: dict[str, Tensor] = {}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return self.place.parameters

    @property
    def lasts(self) -> bool:
        """Whether there is a graph, for the next layer to use too."""
        return self._graph is not None

    def serves(self, place: _Place, run: Run) -> bool:
        """Whether the graph is that of another layer's step too, as far as can be seen from outside."""
        graph, constants = self._graph, place.constants()
        return (
            graph is not None
            and run.pruned.shape == graph.held[0].shape
            and self._traits == place.traits()
            and self._constants.keys() == constants.keys()
            and all(_equal(value, constants[name]) for name, value in self._constants.items())
            and _alike(graph.call, run.calls[place.index])
        )

    @torch.no_grad()
    def _begin(self) -> None:
        """The layer's own values, and an optimiser that has seen nothing."""
        for name, copy in self._copies.items():
            copy.copy_(self.place.used(name))
            copy.grad = None  # of a step that failed half way
        for state in self._optimiser.state.values():
            for value in state.values():
                value.zero_()

    @torch.no_grad()
    def write(self) -> None:
        """What was trained, into the layer."""
        for name, copy in self._copies.items():
            self.place.put(name, copy.detach())

    def train(self, runs: Sequence[Run], targets: Sequence[LayerTarget], passes: int) -> None:
        """From the layer's own values on, under deterministic kernels where all ops have them."""

        def run(strict: bool) -> None:
            self._begin()
            with reproducible(strict), torch.enable_grad():
                self._steps(runs, targets, passes)

        reproducibly(run, self.device.type == "cuda")

    def _steps(self, runs: Sequence[Run], targets: Sequence[LayerTarget], passes: int) -> None:
        index = self.place.index
        generator = torch.Generator().manual_seed(_SEED + index)
        order = [place for _ in range(passes) for place in torch.randperm(len(runs), generator=generator).tolist()]
        alike = alike_runs(runs, index)
        graph = self._captured(runs[0], targets[0], len(order))
        for step, place in enumerate(order):
            self._rate.fill_(self._peak * (1.0 - step / len(order)))
            run, goal = runs[place], targets[place]
            if graph is not None and alike[place]:
                graph(run.pruned, goal.out, goal.weight)
            else:
                self._step(run, run.pruned, goal.out, goal.weight)

    def _loss(self, run: Run, entered: Tensor, goal: Tensor, weight: Tensor) -> Tensor:
        call = run.calls[self.place.index]
        arguments: tuple[Any, ...] = (entered, *call.arguments)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._mixed, cache_enabled=False):
            out = hidden_of(functional_call(self.place.layer, self._copies, arguments, call.keywords))
        missing = run.flat(goal).float() - run.flat(out).float()
        return (missing.square().mean(1) * weight).mean()

    def _step(self, run: Run, entered: Tensor, goal: Tensor, weight: Tensor) -> Tensor:
        loss = self._loss(run, entered, goal, weight)
        loss.backward()
        self._optimiser.step()
        self._optimiser.zero_grad()
        return loss.detach()

    def _captured(self, run: Run, goal: LayerTarget, steps: int) -> _Graph | None:
        """A step for runs that are like this one as a CUDA graph, where that pays and can be done."""
        if self.device.type != "cuda" or steps < _CAPTURED_STEPS:
            return None
        count = sum(copy.numel() for copy in self._copies.values())
        if self._graph is None and count > _SMALL_PARAMETERS and 16 * count > _HELD_SHARE * free_bytes(self.device):
            return None
        given = run.pruned, goal.out, goal.weight
        if self._graph is not None:  # another layer's: that of this one, if it gives the same loss
            with torch.no_grad():
                want = float(self._loss(run, *given))
            if not abs(float(self._graph(*given)) - want) <= _SAME * abs(want):  # nor where it is NaN
                self._graph = None
        if self._graph is None:
            held = tuple(x.clone() for x in given)
            self._traits, self._constants = self.place.traits(), self.place.constants()
            # A layer that asks the host for something, memory that is short.
            with suppress(RuntimeError, NotImplementedError):
                self._graph = _Graph(run.calls[self.place.index], held, capture(lambda: self._step(run, *held)))
        self._begin()
        return self._graph


@dataclass(frozen=True)
class _Graph:
    """A captured step: of a layer's call, with the tensors that it reads, and what replays it and gives its loss."""

    call: Call
    held: tuple[Tensor, ...]
    replay: Callable[[], Tensor]

    def __call__(self, *given: Tensor) -> Tensor:
        for place, value in zip(self.held, given, strict=True):
            place.copy_(value)
        return self.replay()


def alike_runs(runs: Sequence[Run], index: int) -> list[bool]:
    """Which runs have as much text as the first one, padded alike, and call a layer as that does."""
    one = runs[0]
    call = one.calls[index]
    return [
        run.pruned.shape == one.pruned.shape and _equal(run.rows, one.rows) and _alike(call, run.calls[index])
        for run in runs
    ]


def _alike(one: Call, other: Call) -> bool:
    (mine, structure), (theirs, same) = (tree_flatten((call.arguments, call.keywords)) for call in (one, other))
    return same == structure and all(map(_equal, mine, theirs))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return one is other or (type(one) is type(other) and isinstance(one, (bool, int, float, str)) and one == other)

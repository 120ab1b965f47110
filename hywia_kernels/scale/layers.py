"""The streamed pass: forward, then backward, a layer at a time for all samples, with one layer's weights at hand."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import arch
from ..arch.facts import FingerprintReading
from ..engine.experts import whole_experts
from ..engine.instrument import instrument_layer
from ..engine.layered import Step, backward, hidden_of, kept_on
from ..engine.linear import Scorer
from ..engine.loss import hidden_gradient, targets
from ..engine.patches import forward_replaced, reproducible
from ..engine.results import Results
from ..engine.samples import Samples
from ..errors import HywiaError
from ..method.layer_runs import Entrance, entrance, leaving
from ..progress import Bar
from ..types import Group
from .agreement import check_weights
from .exchange import Exchange, exchanged
from .operands import Operands
from .ranks import Ranks
from .runs import dealt
from .sums import Layout, first_bad
from .weights import Weights
from .work import Work

__all__ = ["NotFinite", "Streamed"]

_FORWARD, _BACKWARD = 1, 3  # steps of the bar: a layer's backward runs it forward again, and scores it


class NotFinite(HywiaError):
    """NaN or Inf in the sums of all processes; every one of them raises it."""


class _Silent(Bar):
    """A bar that a scorer may step; the pass has its own."""

    def __init__(self) -> None:
        self.done = 0

    def step(self, n: int = 1) -> None:
        self.done += n


@dataclass
class _Run:
    """A run of samples on its way through the layers: what enters it, and what it has left behind."""

    samples: Samples
    begin: Entrance | None = None
    hidden: Tensor | None = None
    inputs: list[Tensor] = field(default_factory=list)
    gradient: Tensor | None = None


@dataclass
class _Node:
    """A layer that is instrumented for runs of one size."""

    results: Results
    scorer: Scorer
    replacements: list
    asked: bool


class Streamed:
    """One pass over a calibration set.

    Args:
        model: on `device` but for the layers' weights. modules: all of its modules, by name.
        groups: whose units are scored. runs: of the set, in the order in which their sums are added.
        orders: of the fine sums. scale: of the loss. strict: ask CUDA for the same bits every run.
        offload: keep what enters the layers in the host's memory.

    Attributes:
        seconds: of "forward" and "backward". received: bytes of operands that all processes have got from others.
    """

    def __init__(
        self,
        model: Any,
        modules: dict[str, nn.Module],
        groups: Sequence[Group],
        runs: Sequence[Samples],
        weights: Weights,
        ranks: Ranks,
        work: Work,
        *,
        device: torch.device,
        orders: Sequence[str],
        scale: float,
        backend: str | None,
        strict: bool,
        offload: bool,
    ) -> None:
        self.model, self.modules, self.weights, self.ranks, self.work = model, modules, weights, ranks, work
        self.device, self.orders, self.scale, self.backend = device, tuple(orders), scale, backend
        self.strict, self.offload, self.runs = strict, offload, runs
        self.prefix = arch.architecture(model).layers
        self.layers = arch.layers_of(model)
        by_layer: list[list[Group]] = [[] for _ in self.layers]
        for group in groups:
            by_layer[group.layer].append(group)
        self.layouts = [Layout(of, orders) for of in by_layer]
        self.rows = 1 if exchanged(orders) else len(runs)  # of a layer's sums
        self.mine = {j: _Run(runs[j]) for j in dealt(len(runs), ranks.rank, ranks.size)}
        self.totals: dict[int, Tensor] = {}
        self.facts: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        self.received = 0
        self._orders: dict[tuple[int, ...], Tensor] = {}  # of rows whose operands were exchanged
        self._scorers: dict[int, Scorer] = {}
        self._kept = len(self.layers)

    def run(self) -> None:
        """All of it; afterwards `totals` has every layer's sums and `facts` loss, fingerprint and parameters.

        Raises:
            NotFinite: NaN or Inf in gradients or in the loss. HywiaError: what another process failed with, or weights
                that are not the same on all.
        """
        state = self.work.state
        unfinished = state.get("layer", len(self.layers))
        for layer in range(unfinished, len(self.layers)):
            self.totals[layer] = self.work.sums(layer)
        self._kept = unfinished  # the first of the layers whose sums are in the work folder
        with Bar("scoring", (_FORWARD + _BACKWARD) * unfinished) as bar:
            began = time.monotonic()
            self._forward(unfinished, bar)
            if not state:
                self._loss()
                self.facts |= {"layers": len(self.layers), "runs": len(self.runs)}
            middle = time.monotonic()
            self._backward(unfinished, bar)
        self.seconds = {"forward": round(middle - began, 3), "backward": round(time.monotonic() - middle, 3)}

    @property
    def _sweeps(self) -> bool:
        """Whether this process has the layers' weights at hand, as it must where others gather them with it."""
        return bool(self.mine) or self.weights.together

    def _node(self, nodes: dict[int, _Node], layer: int, samples: Samples) -> _Node:
        """The instrumented layer for a run; those of other runs of its size serve too."""
        size = len(samples)
        if size not in nodes:
            groups = self.layouts[layer].groups
            results = Results(self.modules, groups, size, self.orders, downloaded=False)
            scorer = self._scorers.get(size)
            if scorer is None:
                scorer = self._scorers[size] = Scorer(results, samples, self.scale, self.backend, _Silent())
                scorer.strict = self.strict
            scorer.results = results
            nodes[size] = _Node(results, scorer, *instrument_layer(self.model, self.modules, layer, groups, scorer))
        nodes[size].scorer.begin(samples)
        return nodes[size]

    def _running(self, node: _Node) -> ExitStack:
        """The surroundings of an instrumented layer's forward or backward."""
        stack = ExitStack()
        stack.enter_context(forward_replaced(node.replacements))
        stack.enter_context(reproducible(self.strict and not node.asked))
        return stack

    def _forward(self, unfinished: int, bar: Bar) -> None:
        """Runs of this process through the layers up to the first finished one; keeps what enters each layer."""
        reading = FingerprintReading()
        inside = f"{self.prefix}."
        reading.add({name: module for name, module in self.modules.items() if not name.startswith(inside)})
        whole = unfinished == len(self.layers)
        with closing(self.weights.sweep(range(unfinished) if self._sweeps else [])) as sweep, torch.no_grad():
            for i in sweep:
                of_layer = f"{inside}{i}"
                reading.add({n: m for n, m in self.modules.items() if n == of_layer or n.startswith(f"{of_layer}.")})
                nodes: dict[int, _Node] = {}
                for run in self.mine.values():
                    if run.begin is None:
                        run.begin = entrance(self.model, self.layers, run.samples)
                        run.hidden = run.begin.hidden
                    assert run.hidden is not None
                    run.inputs.append(kept_on(run.hidden, self.offload))
                    if i + 1 == unfinished and not whole:
                        run.hidden = None  # the layers from here on are finished
                        continue
                    call = run.begin.calls[i]
                    node = self._node(nodes, i, run.samples)
                    with self._running(node):
                        out = self.layers[i].forward(run.hidden, *call.arguments, **call.keywords)
                    run.hidden = hidden_of(out)
                nodes.clear()  # they hold this layer's weights
                bar.step(_FORWARD)
        read = check_weights(reading, self.ranks, self.work, bool(self.mine))
        self.facts["weights"] = read
        if whole:
            mine = [reading.digest(self.model, self.modules), reading.parameters] if self.mine else None
            # Rank 0 always has runs, and so has read everything.
            self.facts["fingerprint"], self.facts["parameters"] = self.ranks.tell(mine, "the fingerprint")[0]
        else:
            self.facts |= {n: self.work.state[n] for n in ("fingerprint", "parameters", "loss", "layers", "runs")}

    def _loss(self) -> None:
        """The loss, and each run's gradient at what left the last layer."""
        losses = torch.zeros(len(self.runs), dtype=torch.float64, device=self.device)
        for j, run in self.mine.items():
            assert run.begin is not None
            assert run.hidden is not None
            last = run.hidden.detach().requires_grad_()
            run.hidden = None
            wanted = targets(run.samples, self.model.get_output_embeddings().weight.device)
            with torch.enable_grad(), reproducible(self.strict):
                final = leaving(self.model, self.layers, run.samples, run.begin, last)
                gradient, loss = hidden_gradient(self.model, final, wanted, self.scale)
                (run.gradient,) = torch.autograd.grad(final, last, gradient)
            losses[j] = loss.double()
        self.ranks.meet("the loss")
        total = float(self.ranks.add_up(losses).sum())
        if not total - total == 0.0:
            raise NotFinite(
                "loss: expected finite numbers, got NaN or Inf; load the model in float32 or bfloat16, and look for "
                "damaged weights or text"
            )
        self.facts["loss"] = total / sum(len(run) for run in self.runs)

    def _backward(self, unfinished: int, bar: Bar) -> None:
        """Scores the layers from the last unfinished one down. A layer's sums are looked at when the next layer's work
        is on its way, so that the device does not wait for the host."""
        if self.work.state and unfinished:
            for j, run in self.mine.items():
                run.gradient = self.work.gradient(unfinished, j, self.device)
        pending: tuple[int, Tensor, dict[int, Tensor]] | None = None
        order = range(unfinished - 1, -1, -1)
        with closing(self.weights.sweep(order) if self._sweeps else iter_of(order)) as sweep:
            for i in sweep:
                rows = self._score(i)
                if pending is not None:
                    self._settle(*pending)
                pending = (i, rows, {j: run.gradient for j, run in self.mine.items() if run.gradient is not None})
                bar.step(_BACKWARD)
        if pending is not None:
            self._settle(*pending)

    def _score(self, i: int) -> Tensor:
        """Runs this process's runs back through a layer; float64 `[rows · width + 2]`: its part of the rows, the bytes
        that it got from others, and, on rank 0, whether the state is to be kept now."""
        layout, layer = self.layouts[i], self.layers[i]
        flat = torch.zeros(self.rows * layout.width + 2, dtype=torch.float64, device=self.device)
        rows = flat[:-2].view(self.rows, layout.width)
        operands = Operands(self.modules, layout.groups) if exchanged(self.orders) and layout.width else None
        nodes: dict[int, _Node] = {}
        for j, run in self.mine.items():
            assert run.begin is not None
            assert run.gradient is not None
            call = run.begin.calls[i]
            step = Step(run.inputs.pop(), self.device, call.arguments, call.keywords)
            node = self._node(nodes, i, run.samples)
            node.results.clear()
            node.scorer.collected = operands
            if operands is not None:
                operands.begin(j)
            with self._running(node):
                run.gradient = backward(layer, step, run.gradient, node.scorer)
            if layout.width and operands is None:
                whole_experts(node.results.fine, node.results.coarse, layout.groups)
                fine = {name: of.double() * len(run.samples) for name, of in node.results.fine.items()}
                rows[j] = layout.row(fine, node.results.coarse)
        if operands is not None:
            with reproducible(self.strict):
                rows[0], flat[-2] = self._exchange(layout, operands).row()
        nodes.clear()
        if self.ranks.speaks and self.work.due(i):
            flat[-1] = 1.0
        return flat

    def _exchange(self, layout: Layout, operands: Operands) -> Exchange:
        order, scale = self.orders[0] if len(self.orders) == 1 else "all", 1.0 / self.scale
        how = (order, scale, self.backend, self.device, self._orders)
        return Exchange(self.modules, layout, operands, self.runs, self.ranks, *how)

    def _settle(self, i: int, flat: Tensor, gradients: Mapping[int, Tensor]) -> None:
        """Adds all processes' rows of a layer, and keeps their sum."""
        self.ranks.meet(f"layer {i}")
        self.ranks.add_up(flat)
        layout = self.layouts[i]
        total = flat[:-2].view(self.rows, layout.width).sum(0).cpu()
        self.received += int(flat[-2])
        bad = first_bad(layout, total)
        if bad is not None:
            raise NotFinite(
                f"{bad}: expected finite gradients, got NaN or Inf; load the model in float32 or bfloat16, and look "
                "for calibration text that gives an infinite loss"
            )
        self.totals[i] = total
        if bool(flat[-1]):
            for layer in range(i, self._kept):
                self.work.keep_layer(layer, self.totals[layer])
            self._kept = i
            self.work.keep_state(i, gradients, self.facts)


def iter_of(order: Sequence[int]) -> Generator[int, None, None]:
    """Layers' indices without their weights, for a process that has no runs."""
    yield from order

"""Which whole layers a model misses least, measured: one after the other goes, and what is left is asked again.

Estimates from gradients, and how much a layer turns the hidden states (block influence, Men et al., arXiv 2403.03853),
miss what removing a layer does, which is no small change. To leave a layer out is cheap enough to be tried: the hidden
states that enter it are at hand, so that only the layers behind it run. What counts is the divergence of next-token
distributions from the dense model's. The next layer is judged with those gone that went before; a layer whose cost was
high when more layers were there is asked again only when its turn comes ("lazy greedy", Minoux 1978).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import arch
from ..arch.holding import check_held, unwrapped
from ..engine import loss
from ..engine.passes import apart
from ..engine.samples import Samples, padded
from ..errors import HywiaError, UsageError
from ..progress import Bar
from ..types import LayerScores
from .calibration_data import check_tokens, digest
from .layer_runs import CHUNK_TOKENS, Entrance, entrance, leaving

__all__ = ["HELD_BYTES", "layer_divergences"]

HELD_BYTES = 1 << 30  # of the dense model's log-probabilities; what is beyond is computed anew each time


@dataclass
class _Run:
    """One run of samples: what enters each layer in the model without the layers that have gone so far."""

    samples: Samples
    begin: Entrance
    entering: dict[int, Tensor]
    dense: Tensor  # final hidden states of the dense model `[tokens without padding, hidden]`
    targets: list[Tensor | None]  # the dense model's log-probabilities, of a part of the tokens each; None: not held


class _Model:
    """A model that layers are left out of, and the divergence that this causes on a text."""

    def __init__(self, model: Any, samples: Samples) -> None:
        self.model, self.layers = model, arch.layers_of(model)
        self.stay = list(range(len(self.layers)))
        self.tokens = samples.total
        vocabulary = getattr(model.get_output_embeddings(), "out_features", None) or arch.text_config(model).vocab_size
        self.step = max(1, loss.LOGIT_BYTES // (4 * vocabulary))
        held = HELD_BYTES // (4 * vocabulary * self.step)  # parts
        self.runs: list[_Run] = []
        for chunk in samples.sorted().chunks(CHUNK_TOKENS):
            begin = entrance(model, self.layers, chunk)
            run = _Run(chunk, begin, {0: begin.hidden}, begin.hidden, [])
            run.dense = self._final(run, self._advance(run, 0))
            for part in run.dense.split(self.step):
                run.targets.append(self._log_probabilities(part) if held > 0 else None)
                held -= 1
            self.runs.append(run)

    def _advance(self, run: _Run, first: int) -> Tensor:
        """Run the layers that stay from `first` on, of which what enters is known; note what enters the others."""
        hidden = run.entering[first]
        for index in (i for i in self.stay if i >= first):
            run.entering[index] = hidden
            hidden = run.begin.calls[index](self.layers[index], hidden)
        return hidden

    def _final(self, run: _Run, hidden: Tensor) -> Tensor:
        states = leaving(self.model, self.layers, run.samples, run.begin, hidden)
        states = states.reshape(-1, states.shape[-1])
        return states if run.begin.rows is None else states.index_select(0, run.begin.rows.to(states.device))

    def _log_probabilities(self, states: Tensor) -> Tensor:
        return functional.log_softmax(loss.logits_of(self.model, states), -1)

    def without(self, candidate: int) -> float:
        """The mean divergence of the next token, in nats, without those gone and the candidate."""
        total = 0.0
        for run in self.runs:
            hidden = run.entering[candidate]
            for index in (i for i in self.stay if i > candidate):
                hidden = run.begin.calls[index](self.layers[index], hidden)
            states = self._final(run, hidden).split(self.step)
            for part, dense, held in zip(states, run.dense.split(self.step), run.targets, strict=True):
                target = self._log_probabilities(dense) if held is None else held
                got = self._log_probabilities(part)
                difference = functional.kl_div(got, target, log_target=True, reduction="none").sum(-1)
                total += float(difference.sum(dtype=torch.float64))
        mean = total / self.tokens
        if not math.isfinite(mean):
            raise HywiaError(
                f"model: without layer {candidate} its predictions are NaN or Inf; load the model in float32 or "
                "bfloat16"
            )
        return mean

    def take(self, index: int) -> None:
        """Leave a layer out for good."""
        self.stay.remove(index)
        following = next((i for i in self.stay if i > index), None)
        if following is not None:
            for run in self.runs:
                run.entering[following] = run.entering[index]
                self._advance(run, following)
        for run in self.runs:
            del run.entering[index]


@torch.no_grad()
def layer_divergences(
    model: Any,
    batches: Tensor | Sequence[Tensor],
    *,
    most: int | None = None,
    layers: tuple[int, int] | None = None,
) -> LayerScores:
    """Score whole layers by what the model without them predicts, the first to go first.

    Args:
        model: a causal language model of a known architecture; it is left as it was.
        batches: token ids, as `calibrate` takes them.
        most: how many layers may go; the rest are ranked by what they cost when they were last asked. None: all but
            one.
        layers: half-open range of those that may go; None: all.

    Returns:
        Scores whose values are the layers' ranks, and whose loss is what the layer adds to the mean divergence
        `KL(dense | pruned)` in nats, over the tokens of a sample: for second-order estimates of a sample's mean loss
        take tokens for independent, and come out smaller by their number. The record has the order and the divergence
        with the first, the first two, ... layers gone.

    Raises:
        HywiaError: an unknown architecture, ids beyond the vocabulary, or predictions that are NaN or Inf.
        UsageError: malformed batches, or a number or range of layers that the model has not.
    """
    began = time.monotonic()
    model = unwrapped(model)
    modules = dict(model.named_modules())
    check_held(modules)
    with apart(modules):
        samples = padded(batches)
        check_tokens(samples.tokens, model)
        loss.check_head(model)
        parameters = arch.layer_parameters(model)
        depth = len(parameters)
        first, end = layers or (0, depth)
        if not 0 <= first < end <= depth:
            raise UsageError(f"layers: expected (first, end) with 0 <= first < end <= {depth}, got {layers}")
        least = min(depth - 1, end - first)
        most = least if most is None else min(most, least)
        if most < 1:
            raise UsageError(f"most: expected at least one layer that may go, of {depth}, got {most}")
        order, costs, totals = _greedy(_Model(model, samples), range(first, end), most)
    ranked = [*order, *sorted((i for i in costs if i not in order), key=lambda i: (costs[i], -i))]
    ranked += [i for i in range(depth) if i not in costs]
    values = torch.empty(depth)
    values[ranked] = torch.arange(depth, dtype=torch.float32)
    # Layers that may not go are never asked for their price.
    price = torch.tensor([costs.get(i, max(costs.values())) for i in range(depth)], dtype=torch.float32)
    record = {
        "by": "divergence",
        "samples": len(samples),
        "tokens": samples.total,
        "calibration_sha256": digest(samples.tokens),
        "order": order,
        "divergence": totals,
        "seconds": round(time.monotonic() - began, 3),
    }
    return LayerScores(parameters, values, price * len(samples) / samples.total, record)


def _greedy(model: _Model, candidates: Sequence[int], most: int) -> tuple[list[int], dict[int, float], list[float]]:
    """`(layers as they go, what each candidate added to the divergence when it was last asked, divergence after each)`.

    A layer is not asked again while what it last cost is more than what another costs now: that a layer is missed
    more when others have gone is the rule.
    """
    order: list[int] = []
    totals: list[float] = []
    with Bar("measuring layers", len(candidates) + most - 1) as bar:
        costs: dict[int, float] = {}
        for index in candidates:
            costs[index] = model.without(index)
            bar.step()
        fresh = set(costs)
        while len(order) < most:
            waiting = sorted((i for i in costs if i not in order), key=lambda i: (costs[i], -i))
            index = waiting[0]
            if index not in fresh:
                costs[index] = model.without(index) - totals[-1]
                fresh.add(index)
                continue
            model.take(index)
            totals.append(costs[index] + (totals[-1] if totals else 0.0))
            order.append(index)
            fresh.clear()
            if len(order) > 1:
                bar.step()
    return order, costs, totals

"""Which whole layers a model misses least: those that turn the hidden states least; and what it costs when they go.

The influence of a layer is one minus the cosine between what enters and what leaves it, a mean over tokens (Men et al.,
arXiv 2403.03853). It ranks layers by one forward pass. To choose between layers and other units there is a price too:
the first layers of that order are left out one after the other, and the divergence of next-token distributions from the
dense model's is measured each time, since the effect of a whole layer is no small change that gradients could tell.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
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
from ..settings import PRICE_SAMPLES
from ..types import LayerScores
from .calibration_data import check_tokens, digest
from .depth import chosen
from .layer_runs import CHUNK_TOKENS, Entrance, entrance, leaving

__all__ = ["layer_influence"]


@torch.no_grad()
def layer_influence(
    model: Any,
    batches: Tensor | Sequence[Tensor],
    *,
    priced: int = 0,
    layers: tuple[int, int] | None = None,
) -> LayerScores:
    """Score whole layers by how much they turn the hidden states.

    Args:
        model: a causal language model of a known architecture; it is left as it was.
        batches: token ids, as `calibrate` takes them.
        priced: how many layers may go at the most, where they compete with other units; 0: no price is measured.
        layers: half-open range of those that may go; None: all.

    Returns:
        Scores whose values are the influences. With `priced`, their loss is what the layer adds to the mean divergence
        `KL(dense | pruned)` in nats when those before it have gone, on the first samples (`PRICE_SAMPLES`), over the
        tokens of a sample: second-order estimates of a sample's mean loss take tokens for independent, and come out
        smaller by their number. Layers beyond the priced ones have the dearest price. The record has the influences,
        and the divergence with the first, the first two, ... layers of the order gone.

    Raises:
        HywiaError: an unknown architecture, ids beyond the vocabulary, or hidden states or predictions that are NaN or
            Inf. UsageError: malformed batches, or a number or range of layers that the model has not.
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
        if not 0 <= priced < depth:
            raise UsageError(f"priced: expected 0 to {depth - 1} layers that may go, got {priced}")
        with Bar("ranking layers", 1 + priced) as bar:
            influence = _influence(model, samples)
            bar.step()
            scores = LayerScores(parameters, influence)
            totals = _divergences(model, samples, scores, min(priced, end - first), (first, end), bar)
    record = {
        "by": "influence",
        "samples": len(samples),
        "tokens": samples.total,
        "calibration_sha256": digest(samples.tokens),
        "influence": influence.tolist(),
        "divergence": totals,
        "seconds": round(time.monotonic() - began, 3),
    }
    return LayerScores(parameters, influence, _prices(scores, totals, samples, (first, end)), record)


def _prices(scores: LayerScores, totals: Sequence[float], samples: Samples, span: tuple[int, int]) -> Tensor | None:
    """The loss of each layer, from the divergence with the first, the first two, ... of those in the span gone."""
    if not totals:
        return None
    steps = [after - before for before, after in zip([0.0, *totals], totals, strict=False)]
    price = torch.full((len(scores.parameters),), max(steps))
    for index, step in zip([i for i in scores.order if span[0] <= i < span[1]], steps, strict=False):
        price[index] = step
    return price * len(samples) / samples.total


def _runs(model: Any, samples: Samples) -> Iterator[tuple[Samples, Entrance]]:
    layers = arch.layers_of(model)
    for chunk in samples.sorted().chunks(CHUNK_TOKENS):
        yield chunk, entrance(model, layers, chunk)


def _flat(states: Tensor, begin: Entrance) -> Tensor:
    """`[tokens without padding, features]`."""
    states = states.reshape(-1, states.shape[-1])
    return states if begin.rows is None else states.index_select(0, begin.rows.to(states.device))


def _influence(model: Any, samples: Samples) -> Tensor:
    """float32 `[layers]` on the CPU."""
    layers = arch.layers_of(model)
    totals = [0.0] * len(layers)
    for _, begin in _runs(model, samples):
        hidden = begin.hidden
        for index, layer in enumerate(layers):
            out = begin.calls[index](layer, hidden)
            alike = functional.cosine_similarity(_flat(hidden, begin).float(), _flat(out, begin).float(), dim=-1)
            totals[index] += float((1.0 - alike).sum(dtype=torch.float64))
            hidden = out
    for index, total in enumerate(totals):
        if not math.isfinite(total):
            raise HywiaError(
                f"model: layer {index} gives hidden states that are NaN or Inf; load the model in float32 or bfloat16, "
                "and look for damaged weights"
            )
    return torch.tensor(totals).div(samples.total)


def _divergences(
    model: Any, samples: Samples, scores: LayerScores, most: int, span: tuple[int, int], bar: Bar
) -> list[float]:
    """The mean divergence of the next token, in nats, without the first, the first two, ... `most` layers."""
    few = Samples(samples.tokens[:PRICE_SAMPLES], samples.lengths[:PRICE_SAMPLES], samples.index[:PRICE_SAMPLES])
    totals = [0.0] * most
    layers = arch.layers_of(model)
    for chunk, begin in _runs(model, few) if most else ():

        def final(keep: Sequence[int], chunk: Samples = chunk, begin: Entrance = begin) -> Tensor:
            hidden = begin.hidden
            for index in keep:
                hidden = begin.calls[index](layers[index], hidden)
            return _flat(leaving(model, layers, chunk, begin, hidden), begin)

        dense = final(range(len(layers)))
        for gone in range(1, most + 1):
            depth = chosen(scores, gone, span)
            assert depth is not None
            totals[gone - 1] += _divergence(model, dense, final(depth.keep)) / few.total
            bar.step()
    if not all(map(math.isfinite, totals)):
        raise HywiaError("model: without some layers its predictions are NaN or Inf; load it in float32 or bfloat16")
    return totals


def _divergence(model: Any, dense: Tensor, other: Tensor) -> float:
    """`Σ KL(dense | other)` of the next-token distributions that final hidden states `[tokens, features]` give; logits
    exist for a part of the tokens at a time."""
    vocabulary = getattr(model.get_output_embeddings(), "out_features", None) or arch.text_config(model).vocab_size
    step = max(1, loss.LOGIT_BYTES // (4 * vocabulary))
    total = 0.0
    for one, two in zip(dense.split(step), other.split(step), strict=True):
        target, got = (functional.log_softmax(loss.logits_of(model, states), -1) for states in (one, two))
        difference = functional.kl_div(got, target, log_target=True, reduction="none")
        total += float(difference.sum(dtype=torch.float64))
    return total

"""Seconds of each stage of a run, from the model's shapes and the rates of a device."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..method.recovery.job import asked_tokens
from ..method.recovery.request import Recovery
from ..method.sampling import even
from ..method.search import LEAST_TRAINED_TOKENS
from ..settings import PRICE_SAMPLES, SELF
from .cost import Cost
from .rates import Rates
from .solved import head_widths, inputs_of, solved

__all__ = [
    "cutting",
    "layer_ranking",
    "layer_training",
    "ranking",
    "reconstruction",
    "recovery",
    "recovery_text",
    "scoring",
    "searching",
    "writing",
]

_FORWARD = 0.55  # of the products' rate: a forward pass over some thousand tokens
_SCORING = 0.5  # the same of a forward and backward pass with its scores
_RECONSTRUCTION = 0.9  # the same of the passes of full chunks through one layer at a time
_DRAWN_COPIES = 8  # times that a step's logits are read or written until its tokens are drawn
_DECODING = 0.3  # of a step's products, which are narrow
_MOMENTS = 0.9  # of the moments' rate
_TRAINING = 0.4  # of the products' rate: passes of some thousand tokens with their gradients
_NARROW_TRAINING = 0.18  # of bfloat16's, of a float32 model: what stands beside its products is as slow as before
_CUT_COPIES = 15  # times the weights could be read or written while they are cut


def _forward(work: Cost, samples: int, seq_len: int, *, logits: bool) -> float:
    """FLOPs of a forward pass; `logits` of every token."""
    without = work.prefill_flops(samples, seq_len) - 2.0 * samples * work.head
    return without + (2.0 * samples * seq_len * work.head if logits else 0.0)


def writing(work: Cost, samples: int, seq_len: int, device: torch.device, rates: Rates) -> float:
    """A decoding step for every token: its products, what is done with its logits, and at least the weights' bytes, and
    the layers' launches where they are few enough to matter."""
    if not samples:
        return 0.0
    batch = even(samples, device.type, work.parameters)
    rate = rates.narrow or rates.products
    products = _forward(work, batch, 1, logits=True) / (rate * _DECODING)
    logits = _DRAWN_COPIES * 4 * batch * (work.head // work.hidden) / rates.copies
    reads = work.decode_bytes(batch, seq_len // 2) / rates.copies
    return math.ceil(samples / batch) * (seq_len - 1) * max(products + logits + reads, len(work.kv) * rates.launch)


def scoring(work: Cost, samples: int, seq_len: int, rates: Rates) -> float:
    """Three times a forward pass: that, gradients of activations, and those of weights."""
    return 3.0 * _forward(work, samples, seq_len, logits=True) / (rates.products * _SCORING)


def ranking(work: Cost, groups: Any, samples: int, seq_len: int, rates: Rates) -> float:
    """A forward pass, second moments `[width, width]` of every layer's heads, and an inverse of each."""
    if not samples:
        return 0.0
    passes = _forward(work, samples, seq_len, logits=False) / (rates.products * _FORWARD)
    moments = sum(2.0 * samples * seq_len * width**2 for width in head_widths(groups))
    return (
        passes
        + moments / (rates.moments * _MOMENTS)
        + sum(float(width) ** 3 for width in head_widths(groups)) / rates.factors
    )


def recovery_text(work: Cost, recover: Recovery | None, device: torch.device, rates: Rates) -> float:
    """The dense model writes its share of the text."""
    if recover is None or SELF not in recover.text:
        return 0.0
    share = dict(zip(recover.text, recover.source_shares, strict=True))[SELF]
    samples = round(share * ((recover.text_tokens or 0) / recover.seq_len + recover.held_out))
    return writing(work, samples, recover.seq_len, device, rates)


def recovery(work: Cost, recover: Recovery | None, kept: float, rates: Rates) -> float:
    """A forward pass of the dense model for every token that it is asked about, for every one that is trained on three
    of the cut one, or two where few of its weights are trained; and the checks, forward passes of both."""
    if recover is None:
        return 0.0
    length = recover.seq_len
    a_sample = _forward(work, 1, length, logits=True)
    passes = (3.0 if recover.tune == "full" else 2.0) * kept
    trained = ((recover.tokens or 0) * passes + asked_tokens(recover)) / length
    judged = (recover.checks + 1) * recover.held_out * (1.0 + kept)
    return a_sample * (trained / _training_rate(rates) + judged / (rates.products * _FORWARD))


def _training_rate(rates: Rates) -> float:
    """FLOP/s of passes with their gradients."""
    return rates.products * _TRAINING if rates.narrow is None else rates.narrow * _NARROW_TRAINING


def layer_ranking(work: Cost, samples: int, seq_len: int, priced: int, rates: Rates) -> float:
    """A forward pass; and for the price of each layer that may go one over a few samples, with both models' logits."""
    if not samples:
        return 0.0
    few = min(samples, PRICE_SAMPLES)
    layers = _forward(work, few, seq_len, logits=False)
    price = 2 * _forward(work, few, seq_len, logits=True) - layers
    return (_forward(work, samples, seq_len, logits=False) + priced * price) / (rates.products * _FORWARD)


def reconstruction(work: Cost, groups: Any, samples: int, seq_len: int, kept: float, rates: Rates) -> float:
    """A pass of the dense layer and 0.6 of one for each of its matrices, since none runs further than it must; moments
    of the surviving inputs with themselves and with the outputs; a factorisation and four triangular products' worth of
    solving."""
    if not samples or kept == 1.0:
        return 0.0
    matrices = solved(groups)
    tokens, layers = samples * seq_len, max(len(work.kv), 1)
    passes = (1.0 + 0.6 * len(matrices) / layers) * _forward(work, samples, seq_len, logits=False)
    moments = factors = 0.0
    for group in matrices:
        inputs, outputs = kept * inputs_of(group), work.hidden
        moments += 2.0 * tokens * inputs * (inputs + outputs) + 4.0 * inputs**2 * outputs
        factors += inputs**3
    return (
        passes / (rates.products * _RECONSTRUCTION) + moments / (rates.moments * _MOMENTS) + factors / 3 / rates.factors
    )


def layer_training(work: Cost, samples: int, seq_len: int, passes: int, kept: float, rates: Rates) -> float:
    """Each pass a forward and a backward of the layers that are left; forwards measure on some text what it brought."""
    if not passes or kept == 1.0:
        return 0.0
    forward = kept * _forward(work, samples, seq_len, logits=False)
    rate = rates.products * _RECONSTRUCTION if rates.narrow is None else _training_rate(rates)
    return (3.0 * passes + 0.5) * forward / rate


def searching(
    work: Cost, groups: Any, trials: int, samples: tuple[int, int], seq_len: int, passes: int, kept: float, rates: Rates
) -> float:
    """Of each plan a short reconstruction, with layers trained where there is the text for it, and a forward pass of
    what it is judged on with the logits of both models; the dense model's pass comes once."""
    if not trials:
        return 0.0
    refit, judged = samples
    judging = _forward(work, judged, seq_len, logits=False) / (rates.products * _FORWARD)
    logits = 2.0 * 2.0 * judged * seq_len * work.head / (rates.products * _FORWARD)
    solving = reconstruction(work, groups, refit, seq_len, kept, rates)
    if refit * seq_len >= LEAST_TRAINED_TOKENS:
        solving += layer_training(work, refit, seq_len, passes, kept, rates)
    return trials * (solving + judging + logits) + judging


def cutting(work: Cost, rates: Rates) -> float:
    """The weights copied some times over."""
    return _CUT_COPIES * work.weight_bytes / rates.copies

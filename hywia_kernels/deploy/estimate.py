"""What a run will take, before it begins: seconds by stage, memory of the device, room on the disk.

FLOPs are counted from the model's shapes (see each function); a stage's seconds are its FLOPs over the device's rate of
the kind and the stage's efficiency, which is the share of that rate the stage was measured to reach. They were set on
LLaMA-7B's shapes in bfloat16 on an H100 with products of 780 TFLOP/s, cut by half: scoring 96 samples of 128 tokens
1.2 s, head ranking on them 2.2 s, reconstruction on 1,024 samples 14.7 s, cutting 0.10 s; and roughly, on a CPU of two
threads shared with other work, on SmolLM2. Expect the right order of magnitude, and a factor of two or three where a
device is shared, a model is very small or its layers are run by a slower path. Reading and writing the model on the
disk is not counted, nor is evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import arch
from ..arch.facts import weight_bytes
from ..engine.loss import LOGIT_BYTES
from ..engine.memory import free_bytes, scoring_bytes
from ..engine.samples import padded
from ..errors import UsageError
from ..method.equations import can_hold
from ..method.recovery.job import asked_tokens, micro_tokens
from ..method.recovery.request import Recovery
from ..method.recovery.tuning import training_bytes
from ..method.sampling import WRITING_SHARE, even
from ..method.search import LEAST_TRAINED_TOKENS
from ..method.training_runs import TRAINED_TOKENS
from ..settings import PRICE_SAMPLES, SELF
from ..types import Group
from .cost import Cost, cost_of
from .rates import Rates, measured_rates

__all__ = ["STAGES", "Estimate", "estimate"]

STAGES = (
    "writing",
    "scoring",
    "head ranking",
    "layer ranking",
    "searching",
    "reconstruction",
    "cutting",
    "recovery text",
    "recovery",
)
_CHUNK_TOKENS = 8192  # that head ranking and reconstruction run at a time
_FORWARD = 0.55  # of the products' rate: a forward pass over some thousand tokens
_SCORING = 0.5  # the same of a forward and backward pass with its scores
_RECONSTRUCTION = 0.9  # the same of the passes of full chunks through one layer at a time
_DRAWN_COPIES = 8  # times that a step's logits are read or written until its tokens are drawn
_DECODING = 0.3  # of a step's products, which are narrow
_MOMENTS = 0.9  # of the moments' rate
_TRAINING = 0.4  # of the products' rate: passes of some thousand tokens with their gradients
_NARROW_TRAINING = 0.18  # of bfloat16's, of a float32 model: what stands beside its products is as slow as before
_CUT_COPIES = 15  # times the weights could be read or written while they are cut


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        seconds: by stage, of STAGES; those that the run does not have are left out.
        memory_bytes: of the device at the stage that needs most, the weights with it.
        disk_bytes: of the weights that are written.
    """

    seconds: Mapping[str, float]
    memory_bytes: int
    disk_bytes: int

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def estimate(
    model: Any,
    *,
    samples: int = 96,
    seq_len: int = 128,
    writes: bool = False,
    ranks_heads: bool = False,
    layer_samples: int = 0,
    layers_priced: int = 0,
    reconstruct_samples: int = 0,
    layer_passes: int = 0,
    recover: Recovery | None = None,
    trials: int = 0,
    trial_samples: tuple[int, int] = (0, 0),
    ratio: float = 0.5,
    device: torch.device | str | None = None,
    rates: Rates | None = None,
) -> Estimate:
    """Estimate a run of the recipe.

    Args:
        model: to be pruned; it may be on the meta device (`skeleton`).
        samples: scored, 0 for a run that scores nothing on text. seq_len: tokens of a sample.
        writes: the model writes the text, as many samples as scoring or reconstruction takes.
        ranks_heads: heads are ranked by a regression, on the samples that are scored.
        layer_samples: on which whole layers are scored, 0 for none. layers_priced: how many of them get a price.
        reconstruct_samples: 0 for none. layer_passes: over them in which each layer is trained.
        recover: the recovery that follows, resolved; None: none.
        trials: plans that a search tries. trial_samples: that each is refitted and judged on.
        ratio: share of the units that goes.
        device: of the run; None: the model's, or the CPU where that is the meta device.
        rates: of the device; None: they are measured, in about 0.3 s.

    Raises:
        UsageError: a count below zero, fewer than two tokens, or a ratio beyond [0, 1). HywiaError: an unknown
            architecture.
    """
    for name, value, least in (
        ("samples", samples, 0),
        ("seq_len", seq_len, 2),
        ("layer_samples", layer_samples, 0),
        ("layers_priced", layers_priced, 0),
        ("reconstruct_samples", reconstruct_samples, 0),
        ("layer_passes", layer_passes, 0),
        ("trials", trials, 0),
        *(("trial_samples", count, 0) for count in trial_samples),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"{name}: expected a whole number from {least}, got {value!r}")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 <= ratio < 1.0:
        raise UsageError(f"ratio: expected a number from 0 to below 1, got {ratio!r}")
    where = _device(model, device)
    work, groups = cost_of(model), arch.groups(model)
    rates = measured_rates(where, next(model.parameters()).dtype) if rates is None else rates
    scored = samples if ranks_heads else 0
    seconds = {
        "writing": _writing(work, max(samples, reconstruct_samples) if writes else 0, seq_len, where, rates),
        "scoring": _scoring(work, samples, seq_len, rates),
        "head ranking": _ranking(work, groups, scored, seq_len, rates),
        "layer ranking": _layer_ranking(work, layer_samples, seq_len, layers_priced, rates),
        "searching": _searching(work, groups, trials, trial_samples, seq_len, layer_passes, 1.0 - ratio, rates),
        "reconstruction": _reconstruction(work, groups, reconstruct_samples, seq_len, 1.0 - ratio, rates)
        + _layer_training(work, reconstruct_samples, seq_len, layer_passes, 1.0 - ratio, rates),
        "cutting": _CUT_COPIES * work.weight_bytes / rates.copies if ratio else 0.0,
        "recovery text": _recovery_text(work, recover, where, rates),
        "recovery": _recovery(work, recover, 1.0 - ratio, rates),
    }
    size = work.element_size
    removed = sum(int(ratio * g.units) * g.unit_parameters for g in groups if not g.tied_width)
    return Estimate(
        seconds={stage: seconds[stage] for stage in STAGES if seconds[stage] > 0.0},
        memory_bytes=work.weight_bytes
        + max(
            _writing_bytes(work, max(samples, reconstruct_samples) if writes else 0, seq_len, where),
            _scoring_bytes(model, groups, samples, seq_len, where),
            _ranking_bytes(work, groups, scored, seq_len),
            _layer_ranking_bytes(work, layer_samples, seq_len),
            _reconstruction_bytes(work, groups, reconstruct_samples, seq_len, 1.0 - ratio)
            + _layer_training_bytes(work, reconstruct_samples, layer_passes, 1.0 - ratio),
            _recovery_bytes(model, work, recover, 1.0 - ratio, where),
            _searching_bytes(work, groups, trials, trial_samples, seq_len, 1.0 - ratio),
        ),
        disk_bytes=max(work.weight_bytes - removed * size, 0),
    )


def _device(model: Any, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    own = next(model.parameters()).device
    return torch.device("cpu") if own.type == "meta" else own


def _forward(work: Cost, samples: int, seq_len: int, *, logits: bool) -> float:
    """FLOPs of a forward pass; `logits` of every token."""
    without = work.prefill_flops(samples, seq_len) - 2.0 * samples * work.head
    return without + (2.0 * samples * seq_len * work.head if logits else 0.0)


def _writing(work: Cost, samples: int, seq_len: int, device: torch.device, rates: Rates) -> float:
    """A decoding step for every token: its products, what is done with its logits, and at least the weights' bytes, and
    the layers' launches where they are few enough to matter."""
    if not samples:
        return 0.0
    batch = even(samples, device.type)
    rate = rates.narrow if rates.narrow and device.type == "cuda" else rates.products
    products = _forward(work, batch, 1, logits=True) / (rate * _DECODING)
    logits = _DRAWN_COPIES * 4 * batch * (work.head // work.hidden) / rates.copies
    reads = work.decode_bytes(batch, seq_len // 2) / rates.copies
    return math.ceil(samples / batch) * (seq_len - 1) * max(products + logits + reads, len(work.kv) * rates.launch)


def _scoring(work: Cost, samples: int, seq_len: int, rates: Rates) -> float:
    """Three times a forward pass: that, gradients of activations, and those of weights."""
    return 3.0 * _forward(work, samples, seq_len, logits=True) / (rates.products * _SCORING)


def _ranking(work: Cost, groups: Any, samples: int, seq_len: int, rates: Rates) -> float:
    """A forward pass, second moments `[width, width]` of every layer's heads, and an inverse of each."""
    if not samples:
        return 0.0
    passes = _forward(work, samples, seq_len, logits=False) / (rates.products * _FORWARD)
    moments = sum(2.0 * samples * seq_len * width**2 for width in _head_widths(groups))
    return (
        passes
        + moments / (rates.moments * _MOMENTS)
        + sum(float(width) ** 3 for width in _head_widths(groups)) / rates.factors
    )


def _recovery_text(work: Cost, recover: Recovery | None, device: torch.device, rates: Rates) -> float:
    """The dense model writes its share of the text."""
    if recover is None or SELF not in recover.text:
        return 0.0
    share = dict(zip(recover.text, recover.source_shares, strict=True))[SELF]
    samples = round(share * ((recover.text_tokens or 0) / recover.seq_len + recover.held_out))
    return _writing(work, samples, recover.seq_len, device, rates)


def _recovery(work: Cost, recover: Recovery | None, kept: float, rates: Rates) -> float:
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


def _layer_ranking(work: Cost, samples: int, seq_len: int, priced: int, rates: Rates) -> float:
    """A forward pass; and for the price of each layer that may go one over a few samples, with both models' logits."""
    if not samples:
        return 0.0
    few = min(samples, PRICE_SAMPLES)
    layers = _forward(work, few, seq_len, logits=False)
    price = 2 * _forward(work, few, seq_len, logits=True) - layers
    return (_forward(work, samples, seq_len, logits=False) + priced * price) / (rates.products * _FORWARD)


def _head_widths(groups: Any) -> list[int]:
    return [_inputs(g) for g in groups if g.kind == "attention"]


def _inputs(group: Group) -> int:
    """Width of what enters the matrix through which the units send their output on."""
    return group.units * group.members[-1].group_size


def _solved(groups: Any) -> list[Group]:
    """The groups whose output matrices are solved again, but for stacked experts': theirs see few tokens each, and
    take one pass a layer together."""
    return [g for g in groups if g.members[-1].index is None and g.kind != "experts"]


def _reconstruction(work: Cost, groups: Any, samples: int, seq_len: int, kept: float, rates: Rates) -> float:
    """A pass of the dense layer and 0.6 of one for each of its matrices, since none runs further than it must; moments
    of the surviving inputs with themselves and with the outputs; a factorisation and four triangular products' worth of
    solving."""
    if not samples or kept == 1.0:
        return 0.0
    solved = _solved(groups)
    tokens, layers = samples * seq_len, max(len(work.kv), 1)
    passes = (1.0 + 0.6 * len(solved) / layers) * _forward(work, samples, seq_len, logits=False)
    moments = factors = 0.0
    for group in solved:
        inputs, outputs = kept * _inputs(group), work.hidden
        moments += 2.0 * tokens * inputs * (inputs + outputs) + 4.0 * inputs**2 * outputs
        factors += inputs**3
    return (
        passes / (rates.products * _RECONSTRUCTION) + moments / (rates.moments * _MOMENTS) + factors / 3 / rates.factors
    )


def _layer_training(work: Cost, samples: int, seq_len: int, passes: int, kept: float, rates: Rates) -> float:
    """Each pass a forward and a backward of the layers that are left; forwards measure on some text what it brought."""
    if not passes or kept == 1.0:
        return 0.0
    forward = kept * _forward(work, samples, seq_len, logits=False)
    rate = rates.products * _RECONSTRUCTION if rates.narrow is None else _training_rate(rates)
    return (3.0 * passes + 0.5) * forward / rate


def _searching(
    work: Cost, groups: Any, trials: int, samples: tuple[int, int], seq_len: int, passes: int, kept: float, rates: Rates
) -> float:
    """Of each plan a short reconstruction, with layers trained where there is the text for it, and a forward pass of
    what it is judged on with the logits of both models; the dense model's pass comes once."""
    if not trials:
        return 0.0
    refit, judged = samples
    judging = _forward(work, judged, seq_len, logits=False) / (rates.products * _FORWARD)
    logits = 2.0 * 2.0 * judged * seq_len * work.head / (rates.products * _FORWARD)
    solving = _reconstruction(work, groups, refit, seq_len, kept, rates)
    if refit * seq_len >= LEAST_TRAINED_TOKENS:
        solving += _layer_training(work, refit, seq_len, passes, kept, rates)
    return trials * (solving + judging + logits) + judging


def _writing_bytes(work: Cost, samples: int, seq_len: int, device: torch.device) -> int:
    """The cache of the samples that are written at once, and logits in float32 with what sampling makes of them."""
    each = seq_len * work.kv_bytes_per_token + 4 * 4 * (work.head // work.hidden)
    return min(even(samples, device.type) * each, int(WRITING_SHARE * free_bytes(device))) if samples else 0


def _scoring_bytes(model: Any, groups: Any, samples: int, seq_len: int, device: torch.device) -> int:
    if not samples:
        return 0
    free = free_bytes(device)
    if next(model.parameters()).is_meta:
        free -= weight_bytes(model)  # they are to be there too
    text = padded(torch.zeros(samples, seq_len, dtype=torch.int64))
    kernels = device.type == "cuda"
    return scoring_bytes(model, arch.linears(model, groups), groups, text, max(free, 0), kernels=kernels)


def _layer_bytes(work: Cost, tokens: int) -> int:
    """Activations of one layer's widest part, in the model's dtype."""
    widest = max(n + k for n, k in work.matrices)
    return work.element_size * tokens * (4 * work.hidden + 3 * widest)


def _layer_ranking_bytes(work: Cost, samples: int, seq_len: int) -> int:
    """Hidden states of a chunk, of the dense model too, and logits of a part of the tokens."""
    if not samples:
        return 0
    tokens = min(samples * seq_len, max(_CHUNK_TOKENS, seq_len))
    return 4 * tokens * work.hidden * work.element_size + 4 * LOGIT_BYTES + _layer_bytes(work, tokens)


def _ranking_bytes(work: Cost, groups: Any, samples: int, seq_len: int) -> int:
    """The hidden states, one chunk's activations, and one layer's moments with factor and inverse, in float64."""
    if not samples:
        return 0
    tokens, width = samples * seq_len, max(_head_widths(groups), default=0)
    moments = width * width * 6 * 8
    states = tokens * work.hidden * work.element_size
    return states + moments + _layer_bytes(work, min(tokens, max(_CHUNK_TOKENS, seq_len)))


def _reconstruction_bytes(work: Cost, groups: Any, samples: int, seq_len: int, kept: float) -> int:
    """Hidden states of both models, what leaves the dense layer and what its attention adds, for all tokens, and what
    enters a layer's last matrix where that is held; a chunk's activations, one matrix's equations with what solving
    them makes, in float64, and a copy of one layer's weights."""
    if not samples or kept == 1.0:
        return 0
    tokens = samples * seq_len
    states = 4 * tokens * work.hidden * work.element_size
    inputs = math.ceil(kept * max((_inputs(g) for g in _solved(groups)), default=0))
    equations = inputs * (inputs + work.hidden) * 4 * 8
    layer = work.weight_bytes // max(len(work.kv), 1)
    held = tokens * inputs * work.element_size
    states += held if can_hold(held, work.weight_bytes) else 0
    return states + equations + layer + _layer_bytes(work, min(tokens, max(_CHUNK_TOKENS, seq_len)))


def _layer_training_bytes(work: Cost, samples: int, passes: int, kept: float) -> int:
    """Float32 copies of one layer's weights with their gradients and AdamW's two moments, those weights as they were,
    and what a step's backward reads."""
    if not samples or not passes or kept == 1.0:
        return 0
    layers = max(len(work.kv), 1)
    weights = work.weight_bytes // work.element_size // layers
    widths = sum(n + k for n, k in work.matrices) // layers
    return weights * (16 + work.element_size) + 4 * TRAINED_TOKENS * (widths + 4 * work.hidden)


def _recovery_bytes(model: Any, work: Cost, recover: Recovery | None, kept: float, device: torch.device) -> int:
    """The dense model beside the cut one, what training holds of the weights, and the activations of the samples that
    are in memory at a time."""
    if recover is None or recover.tune is None:
        return 0
    dense = {"live": 1.0, "8bit": 0.5, "kept": 0.0}[recover.hold or "live"] * work.weight_bytes
    widths = sum(n + k for n, k in work.matrices)
    activations = 4 * micro_tokens(device) * (widths + 4 * work.hidden * len(work.kv))
    return int(dense + kept * (training_bytes(model, recover.tune, recover.rank) + activations))


def _searching_bytes(work: Cost, groups: Any, trials: int, samples: tuple[int, int], seq_len: int, kept: float) -> int:
    """What the short reconstruction needs, hidden states of both models on what it is judged on, and some logits."""
    if not trials:
        return 0
    refit, judged = samples
    states = 3 * judged * seq_len * work.hidden * work.element_size
    return states + 4 * LOGIT_BYTES + _reconstruction_bytes(work, groups, refit, seq_len, kept)

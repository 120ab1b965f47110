"""Bytes of the device's memory that each stage of a run holds beside the weights."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import arch
from ..arch.facts import weight_bytes
from ..engine.loss import LOGIT_BYTES
from ..engine.memory import free_bytes, scoring_bytes
from ..engine.samples import padded
from ..engine.static_driver import JOINED_SHARE
from ..method.equations import can_hold
from ..method.reconstruction import WAITING_SHARE
from ..method.recovery.job import micro_tokens
from ..method.recovery.request import Recovery
from ..method.recovery.tuning import training_bytes
from ..method.sampling import WRITING_SHARE, even
from ..method.training_runs import TRAINED_TOKENS
from .cost import Cost
from .solved import head_widths, inputs_of, solved

__all__ = [
    "layer_ranking",
    "layer_training",
    "ranking",
    "reconstruction",
    "recovery",
    "scoring",
    "searching",
    "writing",
]

_CHUNK_TOKENS = 8192  # that head ranking and reconstruction run at a time


def writing(work: Cost, samples: int, seq_len: int, device: torch.device) -> int:
    """The cache of the samples that are written at once, and logits in float32 with what sampling makes of them; copies
    of matrices that are joined, which are no more than all of the weights."""
    if not samples:
        return 0
    free = free_bytes(device)
    joined = work.weight_bytes if work.weight_bytes <= JOINED_SHARE * free else 0
    each = seq_len * work.kv_bytes_per_token + 4 * 4 * (work.head // work.hidden)
    batch = even(samples, device.type, work.parameters)
    return joined + min(batch * each, int(WRITING_SHARE * free))


def scoring(model: Any, groups: Any, samples: int, seq_len: int, device: torch.device) -> int:
    if not samples:
        return 0
    free = free_bytes(device)
    if next(model.parameters()).is_meta:
        free -= weight_bytes(model)  # they are to be there too
    text = padded(torch.zeros(samples, seq_len, dtype=torch.int64))
    kernels = device.type == "cuda"
    return scoring_bytes(model, arch.linears(model, groups), groups, text, max(free, 0), kernels=kernels)


def _layer(work: Cost, tokens: int) -> int:
    """Activations of one layer's widest part, in the model's dtype."""
    widest = max(n + k for n, k in work.matrices)
    return work.element_size * tokens * (4 * work.hidden + 3 * widest)


def layer_ranking(work: Cost, samples: int, seq_len: int) -> int:
    """Hidden states of a chunk, of the dense model too, and logits of a part of the tokens."""
    if not samples:
        return 0
    tokens = min(samples * seq_len, max(_CHUNK_TOKENS, seq_len))
    return 4 * tokens * work.hidden * work.element_size + 4 * LOGIT_BYTES + _layer(work, tokens)


def ranking(work: Cost, groups: Any, samples: int, seq_len: int) -> int:
    """The hidden states, one chunk's activations, and one layer's moments with factor and inverse, in float64."""
    if not samples:
        return 0
    tokens, width = samples * seq_len, max(head_widths(groups), default=0)
    moments = width * width * 6 * 8
    states = tokens * work.hidden * work.element_size
    return states + moments + _layer(work, min(tokens, max(_CHUNK_TOKENS, seq_len)))


def reconstruction(work: Cost, groups: Any, samples: int, seq_len: int, kept: float) -> int:
    """Hidden states of both models, what leaves the dense layer and what its attention adds, for all tokens, and what
    enters a layer's last matrix where that is held; a chunk's activations, one matrix's equations with what solving
    them makes, in float64, and a copy of one layer's weights."""
    if not samples or kept == 1.0:
        return 0
    tokens = samples * seq_len
    states = 4 * tokens * work.hidden * work.element_size
    inputs = math.ceil(kept * max((inputs_of(g) for g in solved(groups)), default=0))
    equations = inputs * (inputs + work.hidden) * 4 * 8
    layer = work.weight_bytes // max(len(work.kv), 1)
    held = tokens * inputs * work.element_size
    states += held if can_hold(held, work.weight_bytes) else 0
    return states + equations + layer + _layer(work, min(tokens, max(_CHUNK_TOKENS, seq_len)))


def layer_training(work: Cost, samples: int, passes: int, kept: float, device: torch.device) -> int:
    """Float32 copies of one layer's weights with their gradients and AdamW's two moments, those weights as they were,
    what a step's backward reads, and on a GPU with room for it the layers that were trained before."""
    if not samples or not passes or kept == 1.0:
        return 0
    layers = max(len(work.kv), 1)
    weights = work.weight_bytes // work.element_size // layers
    widths = sum(n + k for n, k in work.matrices) // layers
    here = device.type != "cpu" and work.weight_bytes <= WAITING_SHARE * free_bytes(device)
    waiting = work.weight_bytes if here else 0
    return weights * (16 + work.element_size) + 4 * TRAINED_TOKENS * (widths + 4 * work.hidden) + waiting


def recovery(model: Any, work: Cost, recover: Recovery | None, kept: float, device: torch.device) -> int:
    """The dense model beside the cut one, what training holds of the weights, and the activations of the samples that
    are in memory at a time."""
    if recover is None or recover.tune is None:
        return 0
    dense = {"live": 1.0, "8bit": 0.5, "kept": 0.0}[recover.hold or "live"] * work.weight_bytes
    widths = sum(n + k for n, k in work.matrices)
    activations = 4 * micro_tokens(device) * (widths + 4 * work.hidden * len(work.kv))
    return int(dense + kept * (training_bytes(model, recover.tune, recover.rank) + activations))


def searching(work: Cost, groups: Any, trials: int, samples: tuple[int, int], seq_len: int, kept: float) -> int:
    """What the short reconstruction needs, hidden states of both models on what it is judged on, and some logits."""
    if not trials:
        return 0
    refit, judged = samples
    states = 3 * judged * seq_len * work.hidden * work.element_size
    return states + 4 * LOGIT_BYTES + reconstruction(work, groups, refit, seq_len, kept)

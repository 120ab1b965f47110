"""The distillation loss: how far a cut model's next-token distributions are from the dense model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.loss import logits_of

__all__ = ["HeadTargets", "TopTargets", "distillation_loss", "top_targets"]


@dataclass(frozen=True)
class HeadTargets:
    model: Any
    hidden: Tensor


@dataclass(frozen=True)
class TopTargets:
    indices: Tensor
    log_probabilities: Tensor
    rest: Tensor


@torch.no_grad()
def top_targets(model, hidden, k):
    logp = functional.log_softmax(logits_of(model, hidden), -1)
    top = logp.topk(k)
    rest = torch.log1p(-top.values.exp().sum(-1).clamp(max=1 - 1e-6))
    return TopTargets(top.indices.int(), top.values.half(), rest.half())


def distillation_loss(model, hidden, targets, weight, *, labels=None, hard=0.0, backend=None):
    total = hidden.new_zeros((), dtype=torch.float32)
    step = 512
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        logq = functional.log_softmax(logits_of(model, hidden[part]), -1)
        if isinstance(targets, HeadTargets):
            with torch.no_grad():
                logp = functional.log_softmax(logits_of(targets.model, targets.hidden[part]), -1)
            kl = (logp.exp() * (logp - logq)).sum(-1)
        else:
            logp, rest = targets.log_probabilities[part].float(), targets.rest[part].float()
            q = logq.gather(1, targets.indices[part].long())
            qrest = torch.log1p(-q.exp().sum(-1).clamp(max=1 - 1e-6))
            kl = (logp.exp() * (logp - q)).sum(-1) + rest.exp() * (rest - qrest)
        loss = (1 - hard) * kl
        if labels is not None:
            loss = loss - hard * logq.gather(1, labels[part, None])[:, 0]
        total = total + (loss * weight[part]).sum()
    return total

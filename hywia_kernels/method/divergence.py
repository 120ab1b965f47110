"""How far a changed model's predictions are from the dense model's, without the logits of all tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import arch
from ..engine import loss
from ..errors import HywiaError

__all__ = ["mean_divergence"]


@torch.no_grad()
def mean_divergence(model: Any, dense: Tensor, changed: Tensor, head: nn.Module | None = None) -> float:
    """The mean over tokens of `KL(dense ‖ changed)` between next-token distributions, in nats, from float32 logits.

    Logits exist for a part of the tokens at a time: 64 MB of each model's, and about three times as much of what is
    computed from them.

    Args:
        model: the changed model.
        dense, changed: final hidden states `[tokens, hidden]` of both models on the same text.
        head: the dense model's; None: that of the changed one is the same.

    Raises:
        HywiaError: a head whose logits are not known, or a divergence that is NaN or infinite.
    """
    loss.check_head(model)
    total = 0.0
    step = max(1, loss.LOGIT_BYTES // (4 * arch.text_config(model).vocab_size))
    device = model.get_output_embeddings().weight.device
    for want, got in zip(dense.split(step), changed.split(step), strict=True):
        target = functional.log_softmax(loss.logits_of(model, want.to(device), head), -1)
        found = functional.log_softmax(loss.logits_of(model, got.to(device)), -1)
        total += float(functional.kl_div(found, target, log_target=True, reduction="sum").double())
    mean = total / len(dense)
    if mean - mean != 0.0:
        raise HywiaError("model: the divergence of its predictions is NaN or Inf; load it in float32 or bfloat16")
    return mean

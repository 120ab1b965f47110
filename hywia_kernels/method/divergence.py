"""How far a changed model's predictions are from the dense model's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HywiaError
from .distillation import HeadTargets, distillation_loss

__all__ = ["mean_divergence", "with_head"]


@torch.no_grad()
def mean_divergence(model: Any, dense: Tensor, changed: Tensor, by: Any = None) -> float:
    """The mean over tokens of `KL(dense ‖ changed)` between next-token distributions, in nats.

    Args:
        model: the changed model.
        dense, changed: final hidden states `[tokens, hidden]` of both models on the same text.
        by: the model whose head makes the dense model's predictions; None: the changed model's is the same.

    Raises:
        HywiaError: a head whose logits are not known, or a divergence that is NaN or infinite.
    """
    device = model.get_output_embeddings().weight.device
    mean = float(distillation_loss(model, changed.to(device), HeadTargets(by or model, dense.to(device)), None))
    if mean - mean != 0.0:
        raise HywiaError("model: the divergence of its predictions is NaN or Inf; load it in float32 or bfloat16")
    return mean


def with_head(model: Any, head: nn.Module) -> Any:
    """The same model with another head: a second object that shares everything else."""
    other = copy.copy(model)
    vars(other)["_modules"] = dict(model._modules)
    other.set_output_embeddings(head)
    return other

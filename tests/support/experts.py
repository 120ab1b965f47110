"""Experts of a mixture, written out."""

from __future__ import annotations

import torch
from torch import Tensor


def refitted(
    hidden: Tensor, weight: Tensor, share: Tensor, gate_up: Tensor, down: Tensor, keep: Tensor, ridge: float
) -> Tensor:
    """What an expert's matrix is to be after a refit, float64 `[outputs, channels that stay]`: the ridge regression of
    the dense expert's output on the channels that stay, written out.

    Args:
        hidden: `[tokens, inputs]` of the tokens that reach it. weight, share: `[tokens]`, how much one counts in the
            layer, and the router's share. gate_up, down: the dense expert's matrices. keep: the channels that stay.
    """
    gate, up = (hidden @ gate_up.T).chunk(2, -1)
    active, down = (torch.nn.functional.silu(gate) * up).double(), down.double()
    scale = (weight * share**2).double().sqrt()[:, None]
    x, y = (scale * active)[:, keep], scale * (active @ down.T)
    gram = x.T @ x
    penalty = ridge * len(keep) / len(hidden) * gram.diagonal().mean()
    missing = x.T @ (y - x @ down[:, keep].T)
    return down[:, keep] + torch.linalg.solve(gram + penalty * torch.eye(len(keep)), missing).T

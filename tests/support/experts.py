"""Experts of a mixture, written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .comparison import relative


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


def check_refitted(
    solved: Any,
    dense: Any,
    expert: int,
    keep: Tensor,
    hidden: Tensor,
    weight: Tensor,
    chosen: Tensor,
    shares: Tensor,
    ridge: float,
) -> tuple[int, Tensor]:
    """Hold an expert's matrix of a refitted stack against `refitted`.

    Args:
        solved, dense: the stack after the refit, and the dense model's. hidden: `[tokens, inputs]` that enter the
            layer's experts. chosen, shares: `[tokens, experts of a token]`, of which experts, and the router's shares.

    Returns:
        `(how many tokens reach it, its matrix in float64)`.
    """
    token, rank = (chosen == expert).nonzero(as_tuple=True)
    down = dense.down_proj[expert].double()
    want = refitted(hidden[token], weight[token], shares[token, rank], dense.gate_up_proj[expert], down, keep, ridge)
    got = solved.down_proj[expert].double()
    assert relative(got[:, keep], want) <= 1e-5
    assert relative(got[:, keep], down[:, keep]) > 1e-2, "the refit must matter"
    return len(token), got

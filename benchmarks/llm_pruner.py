"""LLM-Pruner's scoring flow (arXiv 2305.11627), written out anew in plain torch: what the engine is compared with.

First order (`param_first`) takes one backward over the whole batch and leaves every parameter's gradient in memory.
Second order (`param_second`, `param_mix`) first takes one backward per sample and adds `g²/n` to an accumulator beside
*every* parameter, then the backward over the whole batch. Scoring then visits each matrix once with eager passes in the
weights' dtype. The scores are sums of `|w·g|`, `|w·F·w|` and `|w·g − ½·w·F·w|`.

Where the original goes wrong this does not follow: a KV group is credited with its own query heads (the original folds
them with another stride), and sums leave the weights' dtype only for the unit totals (the original's do not, and in
float16 they round and underflow). Its passes over memory are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hywia_kernels import arch

TAYLORS = ("param_first", "param_second", "param_mix")


def loss(model, tokens: Tensor) -> Tensor:
    """Mean next-token loss of a batch `[samples, length]`, as Hugging Face models compute it from labels."""
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def accumulate_squares(model: nn.Module, tokens: Tensor) -> dict[nn.Parameter, Tensor]:
    """`Σ_s G_s²/n` of every parameter, in its dtype: one backward per sample."""
    squares: dict[nn.Parameter, Tensor] = {}
    for sample in tokens:
        model.zero_grad(set_to_none=True)
        loss(model, sample[None]).backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                continue
            square = parameter.grad * parameter.grad / len(tokens)
            if parameter in squares:
                squares[parameter] += square
            else:
                squares[parameter] = square
    model.zero_grad(set_to_none=True)
    return squares


@torch.no_grad()
def matrix_score(weight: Tensor, grad: Tensor, square: Tensor | None, axis: int, taylor: str) -> Tensor:
    """One number per row (axis 0) or column (axis 1), pass by pass."""
    salience = weight * grad  # made, and thrown away, for param_second as well
    if taylor == "param_second":
        salience = weight * square * weight
    elif taylor == "param_mix":
        salience = salience - 0.5 * weight * square * weight
    return salience.abs().sum(1 - axis)


def score(model: nn.Module, tokens: Tensor, taylor: str) -> dict[str, Tensor]:
    """Scores of every unit: group name -> float32 `[units]`, on the model's device. Gradients are left in `.grad`.

    Args:
        model: a causal language model that `hywia_kernels.groups` knows.
        tokens: int64 `[samples, length]`, on its device; equally long, so that the batch's loss is the samples' mean.
        taylor: one of `TAYLORS`.
    """
    if taylor not in TAYLORS:
        raise ValueError(f"taylor: expected one of {', '.join(TAYLORS)}, got {taylor!r}")
    squares = {} if taylor == "param_first" else accumulate_squares(model, tokens)
    model.zero_grad(set_to_none=True)
    loss(model, tokens).backward()
    scores = {}
    for group in arch.groups(model):
        total = torch.zeros(group.units, device=tokens.device)
        for member in group.members:
            weight: nn.Parameter = model.get_submodule(member.module).weight  # type: ignore[assignment]
            assert weight.grad is not None
            per_line = matrix_score(weight, weight.grad, squares.get(weight), member.axis, taylor)
            total += per_line.float().view(group.units, member.group_size).sum(1)
        scores[group.name] = total
    return scores

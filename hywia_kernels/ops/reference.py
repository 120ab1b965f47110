"""The meaning of every op, in float64 by plain torch on any device: slow on purpose, and what the others are tested by.

The `*_fp64` functions return float64 for comparisons; the functions named as the ops round to float32.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .calls import BatchCall, LinearCall, TaylorCall

OPS = ("taylor_importance", "linear_importance", "compact", "attention_fusion", "taylor_importance_batch")

Sums = tuple[Tensor, Tensor]


def unavailable() -> str | None:
    return None


def unsupported(op: str, *tensors: Tensor | None) -> str | None:
    return None


def taylor_importance_fp64(
    weight: Tensor, grad: Tensor | None, fisher: Tensor | None, axis: int, order: str, group_size: int
) -> Sums:
    w = weight.double()
    if order == "first":
        assert grad is not None
        t = grad.double() * w
    elif order == "second":
        assert fisher is not None
        t = 0.5 * fisher.double() * w * w
    else:
        assert grad is not None
        assert fisher is not None
        t = grad.double() * w - 0.5 * fisher.double() * w * w
    if axis == 1:
        t = t.t()
    units = t.shape[0] // group_size
    t = t.reshape(units, group_size * t.shape[1])
    return t.abs().sum(1), t.sum(1)


@torch.no_grad()
def taylor_importance(call: TaylorCall, fine: Tensor, signed: Tensor, accumulate: bool) -> None:
    _store(taylor_importance_fp64(*call), (fine, signed), accumulate)


def _store(exact: Sums, out: Sums, accumulate: bool) -> None:
    for sums, rounded in zip(exact, out, strict=True):
        rounded.copy_(sums + rounded if accumulate else sums)


def _fold(terms: Tensor, axis: int, group_size: int) -> Tensor:
    """Sum a matrix over each unit's rows (axis 0) or columns (axis 1)."""
    return terms.sum(1 - axis).view(-1, group_size).sum(1)


def linear_importance_fp64(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: list[int],
    axis: int,
    order: str,
    group_size: int,
    per_sample: bool,
    scale: float,
    mapped: Tensor | None = None,
) -> Sums:
    """`mapped` is not read: the gradients are made in any case."""
    dy, x, w = grad_output.double(), input.double(), weight.double()
    mean, fisher = torch.zeros_like(w), torch.zeros_like(w)
    coarse = []
    for begin, end in itertools.pairwise(offsets):
        gradient = scale * (dy[begin:end].t() @ x[begin:end])
        coarse.append(_fold(gradient * w, axis, group_size))
        mean += gradient
        fisher += gradient.square()
    mean /= len(coarse)
    fisher /= len(coarse)
    first, second = mean * w, 0.5 * fisher * w * w
    terms = {"first": first, "second": second, "mixed": first - second}
    fine = [_fold(t.abs(), axis, group_size) for name, t in terms.items() if order in (name, "all")]
    signed = torch.stack(coarse)
    return torch.stack(fine) if order == "all" else fine[0], signed if per_sample else signed.mean(0, keepdim=True)


@torch.no_grad()
def linear_importance(call: LinearCall, fine: Tensor, coarse: Tensor, accumulate: bool) -> None:
    _store(linear_importance_fp64(*call), (fine, coarse), accumulate)


@torch.no_grad()
def compact(weight: Tensor, keep: Tensor, axis: int, out: Tensor) -> None:
    torch.index_select(weight, axis, keep, out=out)


def standardised_log(x: Tensor) -> Tensor:
    x = x.double()
    if x.numel() == 0:
        return x
    # The floor is a float32 number in every backend, so that a dead unit is equally far from the rest in all of them.
    floor = torch.clamp(x.max() * 1e-12, min=torch.finfo(torch.float32).tiny)
    z = torch.log(torch.maximum(x, floor))
    z = z - z.mean()
    std = z.square().mean().sqrt()
    # A spread below float32 rounding of the logarithms is no spread: every backend calls such an estimate constant.
    return torch.where(std > 1e-6, z / std.clamp(min=1e-30), torch.where(std.isnan(), std, torch.zeros_like(z)))


def attention_fusion_fp64(fine: Tensor, coarse: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    zf, zc = standardised_log(fine), standardised_log(coarse)
    query = 0.5 * (zf + zc)
    weight = torch.sigmoid(query * (zf - zc) / temperature)
    return weight * zf + (1.0 - weight) * zc, weight


@torch.no_grad()
def attention_fusion(fine: Tensor, coarse: Tensor, temperature: float, score: Tensor, weight: Tensor) -> None:
    score64, weight64 = attention_fusion_fp64(fine, coarse, temperature)
    score.copy_(score64)
    weight.copy_(weight64)


def taylor_importance_batch_fp64(call: BatchCall) -> list[Sums]:
    """`(fine, signed)` of each result: the sums of its matrices, added in the order in which they are listed."""
    results: dict[int, Sums] = {}
    for matrix, result in zip(call.matrices, call.into, strict=True):
        fine, signed = taylor_importance_fp64(*matrix)
        before = results.get(result)
        results[result] = (fine, signed) if before is None else (before[0] + fine, before[1] + signed)
    return [results[result] for result in range(len(results))]


@torch.no_grad()
def taylor_importance_batch(call: BatchCall, fine: list[Tensor], signed: list[Tensor], accumulate: bool) -> None:
    for exact, *out in zip(taylor_importance_batch_fp64(call), fine, signed, strict=True):
        _store(exact, (out[0], out[1]), accumulate)

"""The meaning of every op: float64, plain torch, any device. Slow on purpose; the other backends are tested against it.

The `*_fp64` functions return float64 for comparisons; the functions named as the ops round to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

OPS = ("taylor_importance", "compact", "attention_fusion")


def unavailable() -> str | None:
    return None


def unsupported(op: str, *tensors: Tensor | None) -> str | None:
    return None


def taylor_importance_fp64(
    weight: Tensor, grad: Tensor | None, fisher: Tensor | None, axis: int, order: str, group_size: int
) -> tuple[Tensor, Tensor]:
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
def taylor_importance(
    weight: Tensor,
    grad: Tensor | None,
    fisher: Tensor | None,
    axis: int,
    order: str,
    group_size: int,
    fine: Tensor,
    signed: Tensor,
    accumulate: bool,
) -> None:
    fine64, signed64 = taylor_importance_fp64(weight, grad, fisher, axis, order, group_size)
    if accumulate:
        fine64 += fine
        signed64 += signed
    fine.copy_(fine64)
    signed.copy_(signed64)


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

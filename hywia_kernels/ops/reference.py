"""The meaning of every op, in float64 by plain torch on any device: slow on purpose, and what the others are tested by.

The `*_fp64` functions return float64 for comparisons; the functions named as the ops round to float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from .calls import BatchCall, DistillationCall, LinearCall, TaylorCall, TopDistillationCall

OPS = (
    "taylor_importance",
    "linear_importance",
    "compact",
    "attention_fusion",
    "taylor_importance_batch",
    "distillation_gradient",
    "top_distillation_gradient",
)

LOGIT_BYTES = 16 << 20  # of float64 logits of one model that are computed at once

Sums = tuple[Tensor, Tensor]
Distillation = TypeVar("Distillation", DistillationCall, TopDistillationCall)


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


def changed_logits(logits: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """A family's logits and their derivative with respect to the head's, float64."""
    scaled = scale * logits.double()
    if cap is None:
        return scaled, torch.full_like(scaled, scale)
    bent = torch.tanh(scaled / cap)
    return cap * bent, scale * (1.0 - bent.square())


def _divergence(probabilities: Tensor, logarithms: Tensor, student: Tensor) -> Tensor:
    """`Σ p·(log p − log q)`; an outcome of probability 0 counts 0."""
    terms = probabilities * (logarithms - student)
    return torch.where(probabilities > 0, terms, 0.0).sum(1)


def _with_labels(
    loss: Tensor, target: Tensor, student: Tensor, call: DistillationCall | TopDistillationCall
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and target with the labels' share, and which tokens have a label that is no word."""
    wrong = torch.zeros(len(loss), dtype=torch.bool, device=loss.device)
    if call.labels is None:
        return loss, target, wrong
    wrong = (call.labels < 0) | (call.labels >= target.shape[1])
    labels = call.labels.masked_fill(wrong, 0)[:, None]
    loss = (1.0 - call.hard) * loss - call.hard * student.gather(1, labels)[:, 0]
    target = (1.0 - call.hard) * target
    return loss, target.scatter_add(1, labels, torch.full_like(loss[:, None], call.hard)), wrong


def _by_weight(loss: Tensor, gradient: Tensor, weight: Tensor, wrong: Tensor) -> Sums:
    """Loss and gradient with the weights, and what the contract says of weight 0 and of words that are none."""
    nothing = (weight == 0)[:, None]
    gradient = (weight.double()[:, None] * gradient).masked_fill(wrong[:, None], float("nan"))
    loss = loss.masked_fill(wrong, float("nan"))
    return loss.masked_fill(nothing[:, 0], 0.0), gradient.masked_fill(nothing, 0.0)


def distillation_gradient_fp64(call: DistillationCall) -> Sums:
    """Losses `[tokens]` and gradients `[tokens, words]`."""
    z, slope = changed_logits(call.student, call.student_scale, call.student_cap)
    student = z.log_softmax(1)
    teacher = changed_logits(call.teacher, call.teacher_scale, call.teacher_cap)[0].log_softmax(1)
    target = teacher.exp()
    loss, target, wrong = _with_labels(_divergence(target, teacher, student), target, student, call)
    return _by_weight(loss, (student.exp() - target) * slope, call.weight, wrong)


def top_distillation_gradient_fp64(call: TopDistillationCall) -> Sums:
    """The same over the teacher's likeliest words and the rest of them."""
    z, slope = changed_logits(call.student, call.student_scale, call.student_cap)
    student = z.log_softmax(1)
    words = z.shape[1]
    wrong = ((call.indices < 0) | (call.indices >= words)).any(1)
    indices = call.indices.long().masked_fill(wrong[:, None], 0)
    others = torch.ones_like(z, dtype=torch.bool).scatter_(1, indices, False)
    rest_of_student = z.masked_fill(~others, float("-inf")).logsumexp(1, keepdim=True) - z.logsumexp(1, keepdim=True)
    logarithms = torch.cat([call.log_probabilities, call.rest[:, None]], 1).double()
    probabilities = logarithms.exp()
    known = torch.cat([student.gather(1, indices), rest_of_student], 1)
    # A word of the rest gets the rest's mass by the student's own proportions.
    share = (logarithms[:, -1:] + student - rest_of_student).exp()
    target = torch.where(others, share, 0.0).scatter(1, indices, probabilities[:, :-1])
    mass = probabilities.sum(1, keepdim=True)
    loss, target, no_label = _with_labels(_divergence(probabilities, logarithms, known), target, student, call)
    mass = (1.0 - call.hard) * mass + call.hard if call.labels is not None else mass
    return _by_weight(loss, (mass * student.exp() - target) * slope, call.weight, wrong | no_label)


@torch.no_grad()
def distillation_gradient(call: DistillationCall, loss: Tensor, gradient: Tensor | None) -> None:
    for rows, part in _by_rows(call):
        _store_distillation(distillation_gradient_fp64(part), loss, gradient, rows)


@torch.no_grad()
def top_distillation_gradient(call: TopDistillationCall, loss: Tensor, gradient: Tensor | None) -> None:
    for rows, part in _by_rows(call):
        _store_distillation(top_distillation_gradient_fp64(part), loss, gradient, rows)


def _by_rows(call: Distillation) -> Iterator[tuple[slice, Distillation]]:
    """The call in parts of a few tokens, since each computes some ten matrices of float64 logits."""
    tokens, words = call.student.shape
    step = max(1, LOGIT_BYTES // (8 * words))
    for at in range(0, tokens, step):
        rows = slice(at, at + step)
        cut: dict[str, Any] = {n: x[rows] for n, x in call._asdict().items() if isinstance(x, Tensor)}
        yield rows, call._replace(**cut)


def _store_distillation(exact: Sums, loss: Tensor, gradient: Tensor | None, rows: slice) -> None:
    loss[rows] = exact[0]
    if gradient is not None:
        gradient[rows] = exact[1]

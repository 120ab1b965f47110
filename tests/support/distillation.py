"""The distillation loss by its definition, in float64 by autograd, and how near a result must be to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .operands import generator, interpreted

# Error of losses and gradients before they are rounded to the logits' dtype, relative to what is added up. Logits
# below 100 that are multiplied by a scale are rounded by 100·2^-24 = 6e-6, and their exponentials by that share.
TOLERANCE = 1e-5
# Rounding to nearest is off by half a unit in the last place at most. Triton's interpreter cuts bfloat16 off.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2**-25}  # half of the smallest subnormal


@dataclass(frozen=True)
class Change:
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        z = self.scale * logits.double()
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)


PLAIN = Change()


def kept(teacher: Tensor, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, log-probabilities and the rest of the `k` likeliest words of float64 logits."""
    log_p = teacher.log_softmax(1)
    values, indices = log_p.topk(k, 1)
    rest = log_p.scatter(1, indices, float("-inf")).logsumexp(1)
    return indices.int(), values.to(dtype), rest.float()


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of each row of log-probabilities; outcomes without mass count nothing."""
    p = teacher.exp()
    return torch.where(p > 0, p * (teacher - student), 0.0).sum(1)


def top_divergence(student: Tensor, indices: Tensor, log_probabilities: Tensor, rest: Tensor) -> Tensor:
    """The same over the likeliest words and one outcome for the others."""
    known = torch.zeros_like(student, dtype=torch.bool).scatter_(1, indices.long(), True)
    outcomes = [student.gather(1, indices.long())]
    given = [log_probabilities.double()]
    if not known.all():
        outcomes.append(student.masked_fill(known, float("-inf")).logsumexp(1, keepdim=True))
        given.append(rest.double()[:, None])
    return divergence(torch.cat(outcomes, 1), torch.cat(given, 1))


def exact(
    logits: Tensor,
    targets: Tensor | tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    labels: Tensor | None = None,
    hard: float = 0.0,
    student: Change = PLAIN,
    teacher: Change = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Losses `[tokens]` and the gradient of `Σ weight·loss` at the student's logits, float64."""
    leaf = logits.detach().double().requires_grad_()
    with torch.enable_grad():
        log_q = student(leaf).log_softmax(1)
        if isinstance(targets, Tensor):
            loss = divergence(log_q, teacher(targets).log_softmax(1))
        else:
            loss = top_divergence(log_q, *targets)
        if hard:
            assert labels is not None
            loss = (1 - hard) * loss - hard * log_q.gather(1, labels[:, None])[:, 0]
        (gradient,) = torch.autograd.grad((loss * weight.double()).sum(), leaf)
    return loss.detach(), gradient


def assert_near(got, want: tuple[Tensor, Tensor], weight: Tensor, backend: str, slope: float = 1.0) -> None:
    """Loss and gradient within `TOLERANCE`, the gradient also rounded to its dtype; `slope` bounds the change's."""
    loss, gradient = want
    assert got.loss.dtype == torch.float32
    assert ((got.loss - loss).abs() <= TOLERANCE * loss.abs().clamp(min=1.0)).all()
    if got.gradient is None:
        return
    rounding = ROUNDING[got.gradient.dtype]
    if backend == "triton" and interpreted() and got.gradient.dtype == torch.bfloat16:
        rounding *= 2
    # A token's gradient is a difference of distributions, times its weight.
    allowed = rounding * gradient.abs() + SMALLEST[got.gradient.dtype]
    excess = ((got.gradient - gradient).abs() - allowed).clamp(min=0.0)
    assert (excess.norm(dim=1) <= TOLERANCE * abs(slope) * weight.abs()).all()


def logits_of(tokens: int, words: int, dtype: torch.dtype, seed: int, spread: float = 3.0) -> Tensor:
    return (spread * torch.randn(tokens, words, generator=generator(seed))).to(dtype)

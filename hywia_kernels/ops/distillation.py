"""`distillation_gradient` and `top_distillation_gradient`: what a student's logits cost against a teacher's
predictions, and the gradient of it.

Contracts as in `ops/__init__.py`, but for the layout: rows of logits may lie apart, the words of a row are contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, distillation_checks, library
from .calls import DistillationCall, TopDistillationCall

__all__ = ["DistillationGradient", "distillation_gradient", "top_distillation_gradient"]


class DistillationGradient(NamedTuple):
    """Loss of each token, float32 `[tokens]`, and the gradient at the student's logits, or None."""

    loss: Tensor
    gradient: Tensor | None


def distillation_gradient(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor,
    *,
    labels: Tensor | None = None,
    hard: float = 0.0,
    student_scale: float = 1.0,
    student_cap: float | None = None,
    teacher_scale: float = 1.0,
    teacher_cap: float | None = None,
    gradient: bool = True,
    out: Tensor | None = None,
    backend: str | None = None,
) -> DistillationGradient:
    """The distillation loss of every token, and its gradient at the student's logits, written over them.

    With `z = cap·tanh(scale·logits / cap)` of each model (without a cap `z = scale·logits`), `p` and `q` the softmax of
    the teacher's and of the student's `z`, and `a = hard`, a token's loss and its part of the gradient are

        loss = (1 − a)·Σ_v p_v·(log p_v − log q_v) − a·log q_label,
        gradient_v = weight·(q_v − (1 − a)·p_v − a·[v = label])·dz_v/dlogits_v.

    Each row of logits is read twice and the gradient is written once; nothing of that size is made beside it. A token
    of weight 0 is not read: its loss and its gradient are 0. A token whose label is no word has NaN for both.

    Source: Hinton et al. (arXiv 1503.02531), temperature 1; the gradient in the forward pass as in Liger-Kernel's fused
    losses (arXiv 2410.10989); soft-capping as in Gemma 2 (arXiv 2408.00118).

    Args:
        student_logits: `[tokens, words]` as the head gives them, float32, bfloat16 or float16; overwritten by the
            gradient unless `out` is given. At least one word.
        teacher_logits: the same shape and device, any of the three dtypes.
        weight: float32 `[tokens]`, contiguous: multiplies the gradient of each token, and not its loss.
        labels: int64 `[tokens]`, contiguous; not read, and may be None, when `hard` is 0.
        hard: the labels' share `a` of the loss, from 0 to 1.
        student_scale, teacher_scale: what the family multiplies logits by; positive.
        student_cap, teacher_cap: the family's soft cap, positive; None for none.
        gradient: False leaves the logits as they are and gives the losses alone.
        out: where the gradient goes instead, of any of the three dtypes, like `student_logits` in shape and device; it
            must not overlap another operand.
        backend: "reference", "native", "triton", or None for the automatic choice.

    Returns:
        `DistillationGradient(loss, gradient)`. Sums and exponentials are float32 or wider; the gradient is rounded
        once, to the logits' dtype, or `out`'s.

    Raises:
        UsageError: an argument outside the above. BackendError: a named backend that is off or cannot do this.
    """
    call, into = distillation_checks.full(
        DistillationCall(
            student_logits,
            teacher_logits,
            weight,
            labels,
            hard,
            student_scale,
            student_cap,
            teacher_scale,
            teacher_cap,  # type: ignore[arg-type]
        ),
        gradient,
        out,
    )
    return _run("distillation_gradient_", call, into, backend)


def top_distillation_gradient(
    student_logits: Tensor,
    indices: Tensor,
    log_probabilities: Tensor,
    rest: Tensor,
    weight: Tensor,
    *,
    labels: Tensor | None = None,
    hard: float = 0.0,
    student_scale: float = 1.0,
    student_cap: float | None = None,
    gradient: bool = True,
    out: Tensor | None = None,
    backend: str | None = None,
) -> DistillationGradient:
    """`distillation_gradient` from a teacher's likeliest words alone, all others counting as one outcome.

    With `K` the `top` words of a token, `p` their probabilities, `r` the mass of the others and `q_R` the student's own
    mass on these, the divergence is over `top + 1` outcomes, with the probabilities taken as they are given:

        Σ_{v in K} p_v·(log p_v − log q_v) + r·(log r − log q_R),   P = Σ_{v in K} p_v + r,
        gradient_v ∝ P·q_v − p_v for v in K, and P·q_v − r·q_v / q_R for the others.

    An outcome of probability 0 counts 0. With all words in `K` it is the whole divergence.

    Args:
        indices: int32 `[tokens, top]`, contiguous: the words `K`, each once in a row, in any order. A token with an
            index that is no word has NaN for loss and gradient.
        log_probabilities: float32 or float16 `[tokens, top]`, contiguous: the logarithms of `p`.
        rest: float32 `[tokens]`, contiguous: the logarithm of `r`, −inf for 0.
        student_logits, weight, labels, hard, student_scale, student_cap, gradient, out, backend: as in
            `distillation_gradient`. Backend "triton" changes the logits while it runs, also where it puts them back.

    Returns:
        `DistillationGradient(loss, gradient)`, as `distillation_gradient`.

    Raises:
        UsageError: an argument outside the above. BackendError: a named backend that is off or cannot do this.
    """
    call, into = distillation_checks.top(
        TopDistillationCall(
            student_logits,
            indices,
            log_probabilities,
            rest,
            weight,
            labels,
            hard,
            student_scale,
            student_cap,
        ),
        gradient,
        out,
    )
    return _run("top_distillation_gradient_", call, into, backend)


def _run(
    name: str, call: DistillationCall | TopDistillationCall, into: Tensor | None, backend: str | None
) -> DistillationGradient:
    loss = torch.empty(call.student.shape[0], dtype=torch.float32, device=call.student.device)
    if checks.traced(*call.operands, into):
        getattr(torch.ops.hywia, name)(*call, loss, into, backend)
    else:
        getattr(library, name)(call, loss, into, backend)
    return DistillationGradient(loss, into)

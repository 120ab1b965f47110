"""The loss by which a pruned model learns from the dense one.

It is the divergence of the student's next-token distributions from the teacher's (Hinton et al., arXiv 1503.02531, at
temperature 1), and a share of cross-entropy, computed a chunk of tokens at a time: both models' logits by a product
each, then one kernel (`ops.distillation_gradient`) that leaves their gradient in place of the student's or beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..engine import loss as head_loss
from ..errors import UsageError
from .fused_head import Head, Rows, chunks, fused_loss, linear_head

__all__ = ["HeadTargets", "TopTargets", "distillation_loss", "top_targets"]

# Bytes a word while the likeliest are sought: logits, the same in float32, and what logsumexp makes of them.
_TOP_BYTES = 16


@dataclass(frozen=True)
class HeadTargets:
    """A teacher that is at hand: its predictions are made again from its final hidden states.

    Attributes:
        model: the teacher, with its head; it may lie on another device than the student.
        hidden: its final hidden states `[n, teacher's features]`, behind the last norm.
    """

    model: Any
    hidden: Tensor


@dataclass(frozen=True)
class TopTargets:
    """A teacher's predictions as they are kept: of each position the likeliest words, all others as one outcome.

    Attributes:
        indices: int32 `[n, k]`, the words, each once in a row.
        log_probabilities: float32 or float16 `[n, k]`.
        rest: float32 `[n]`, the logarithm of what the other words have together; −inf for nothing.
    """

    indices: Tensor
    log_probabilities: Tensor
    rest: Tensor


def distillation_loss(
    model: Any,
    hidden: Tensor,
    targets: HeadTargets | TopTargets,
    weight: Tensor | None,
    *,
    labels: Tensor | None = None,
    hard: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """`Σ_t weight_t·((1 − hard)·KL(teacher_t ‖ student_t) + hard·CE(label_t, student_t))`.

    What it takes beside weights and gradients (the hidden states' in their dtype, the head's in float32) is a chunk of
    logits: at most `fused_head.CHUNK_BYTES`, on a GPU 1 GB. For 16,384 tokens, 128,256 words and bfloat16 a token has
    (4 + 4 + 2)·128,256 bytes = 1.3 MB of them on a GPU, both models' logits in float32 and their gradient, so 768
    tokens are taken at a time: 985 MB, and three times 6 MB for the chunk's hidden states of 4,096 features. All logits
    in float32 would be 8.4 GB a model. With `TopTargets` there are
    one model's logits, and chunks are twice as long. Positions of weight 0 (padding) are not computed.

    Products are made in the head's dtype, or in autocast's. A frozen head (`requires_grad` False) costs no gradient. A
    head that is the embedding as well gets its gradient through autograd like any other use of that parameter. The
    backward pass can be run once, since the gradients are made in the forward one.

    Args:
        model: the student, a language model with its head.
        hidden: its final hidden states `[n, features]`, behind the last norm, with whatever graph is behind them.
        targets: the teacher's predictions at the same positions.
        weight: float32 `[n]`; for a mean they sum to 1. None: the mean of all positions, for which the host need not
            wait for the device.
        labels: int64 `[n]`, the next tokens; may be None when `hard` is 0. Not read where the weight is 0.
        hard: the share of the cross-entropy, from 0 to 1.
        backend: of `ops.distillation_gradient`.

    Returns:
        A float32 scalar on the head's device, differentiable at `hidden` and at the head's parameters where they
        require it; under `torch.no_grad()` no gradient is made. NaN where a label or an index is no word.

    Raises:
        UsageError: shapes or dtypes outside the above. HywiaError: a model whose logits are not a plain linear head's.
    """
    _check(hidden, linear_head(model), targets, weight, labels, hard)
    teacher = _AtHand(targets) if isinstance(targets, HeadTargets) else _Kept(targets)
    return fused_loss(model, hidden, weight, _Distillation(teacher, labels, float(hard), backend))


def top_targets(model: Any, hidden: Tensor, k: int) -> TopTargets:
    """The likeliest words of each position by a teacher, to be kept where it cannot stay beside the student.

    Args:
        model: the teacher, with its head.
        hidden: its final hidden states `[n, features]`.
        k: words a position, from 1 to all.

    Returns:
        Targets on the head's device, the likeliest word first. Logarithms are float32 for a float32 head; else float16,
        which rounds a logarithm (by 2^-11 of it) less than bfloat16 does a logit.

    Raises:
        UsageError: `hidden` or `k` outside the above. HywiaError: a model whose logits this loss does not know.
    """
    head = linear_head(model).weight
    words, features = head.shape
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= words:
        raise UsageError(f"k: expected from 1 to the head's {words} words, got {k!r}")
    _check_states("hidden", hidden, features)
    n, dtype = len(hidden), torch.float32 if head.dtype == torch.float32 else torch.float16
    indices = torch.empty((n, k), dtype=torch.int32, device=head.device)
    log_probabilities = torch.empty((n, k), dtype=dtype, device=head.device)
    rest = torch.empty(n, dtype=torch.float32, device=head.device)
    with torch.no_grad():
        for part in chunks(n, _TOP_BYTES * words, head.device):
            logits = head_loss.logits_of(model, hidden[part].to(head.device, head.dtype))
            total = logits.logsumexp(1, keepdim=True)
            values, chosen = logits.topk(k, 1)
            indices[part] = chosen
            log_probabilities[part] = values - total
            # By itself: as what the likeliest leave of 1, a small rest would lose its digits.
            rest[part] = logits.scatter_(1, chosen, float("-inf")).logsumexp(1) - total[:, 0]
    return TopTargets(indices, log_probabilities, rest)


class _AtHand:
    """What a teacher's head gives."""

    def __init__(self, targets: HeadTargets) -> None:
        self.head, self.hidden = Head.of(targets.model), targets.hidden.detach()
        self.buffer = self.head.buffer(0)

    def row_bytes(self) -> int:
        return self.head.row_bytes()

    def losses(self, logits: Tensor, rows: Rows, weight: Tensor, **options: Any) -> Tensor:
        states = self.head.states(self.hidden, rows)
        if len(self.buffer) < len(states):
            self.buffer = self.head.buffer(len(states))  # the first chunk is the longest
        theirs = self.head.logits(states, self.buffer).to(logits.device)
        scale, cap = self.head.change
        made = ops.distillation_gradient(logits, theirs, weight, teacher_scale=scale, teacher_cap=cap, **options)
        return made.loss


class _Kept:
    """What was kept of a teacher."""

    def __init__(self, targets: TopTargets) -> None:
        self.kept = targets.indices, targets.log_probabilities, targets.rest

    def row_bytes(self) -> int:
        return 0

    def losses(self, logits: Tensor, rows: Rows, weight: Tensor, **options: Any) -> Tensor:
        words, log_probabilities, rest = (
            x[rows if isinstance(rows, slice) else rows.to(x.device)].to(logits.device) for x in self.kept
        )
        return ops.top_distillation_gradient(logits, words, log_probabilities, rest, weight, **options).loss


@dataclass(frozen=True)
class _Distillation:
    """The loss as `fused_loss` takes it."""

    teacher: _AtHand | _Kept
    labels: Tensor | None
    hard: float
    backend: str | None

    def row_bytes(self) -> int:
        return self.teacher.row_bytes()

    def losses(
        self, logits: Tensor, change: head_loss.LogitChange, rows: Rows, weight: Tensor, gradient: Tensor | None
    ) -> Tensor:
        labels = self.labels
        if labels is not None:
            labels = labels[rows if isinstance(rows, slice) else rows.to(labels.device)].to(logits.device)
        return self.teacher.losses(
            logits,
            rows,
            weight,
            labels=labels,
            hard=self.hard,
            student_scale=change.scale,
            student_cap=change.cap,
            gradient=gradient is not None,
            out=None if gradient is logits else gradient,
            backend=self.backend,
        )


def _check_states(name: str, states: object, features: int) -> None:
    if not isinstance(states, Tensor) or states.dim() != 2 or states.shape[1] != features:
        got = list(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise UsageError(f"{name}: expected final hidden states [n, {features}], got {got}; flatten the positions")
    if not states.is_floating_point():
        raise UsageError(f"{name}: expected a floating-point dtype, got {states.dtype}")


def _check(
    hidden: Tensor,
    module: nn.Linear,
    targets: HeadTargets | TopTargets,
    weight: Tensor | None,
    labels: Tensor | None,
    hard: float,
) -> None:
    """Check what the op does not: the op sees chunks, and its messages would speak of those."""
    words, features = module.weight.shape
    _check_states("hidden", hidden, features)
    n = len(hidden)
    vectors: dict[str, Any] = {} if weight is None else {"weight": weight}
    if isinstance(targets, HeadTargets):
        theirs = linear_head(targets.model).weight
        if theirs.shape[0] != words:
            raise UsageError(
                f"targets: expected a teacher with the student's {words} words, got one with {theirs.shape[0]}; "
                "distillation needs one tokenizer for both"
            )
        _check_states("targets.hidden", targets.hidden, theirs.shape[1])
        vectors["targets.hidden"] = targets.hidden
    elif isinstance(targets, TopTargets):
        names = ("indices", "log_probabilities", "rest")
        vectors |= {f"targets.{name}": getattr(targets, name) for name in names}
    else:
        raise UsageError(f"targets: expected HeadTargets or TopTargets, got {type(targets).__name__}")
    if labels is not None:
        vectors["labels"] = labels
    for name, value in vectors.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != n:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"{name}: expected {n} rows, one for each of the student's hidden states, got {got}")
    if weight is not None and (weight.dtype != torch.float32 or weight.dim() != 1):
        raise UsageError(f"weight: expected float32 [{n}], got {weight.dtype} {list(weight.shape)}")
    if not isinstance(hard, (int, float)) or not 0 <= hard <= 1:
        raise UsageError(f"hard: expected a share from 0 to 1, got {hard!r}")
    if hard > 0 and (labels is None or labels.dtype != torch.int64 or labels.dim() != 1):
        got = "None" if labels is None else f"{labels.dtype} {list(labels.shape)}"
        raise UsageError(f"labels: expected int64 [{n}] for hard={hard!r}, got {got}")

"""A loss of a language model's logits without the logits of all tokens at a time.

Tokens are taken in chunks: the head's product, then the loss, which leaves the logits' gradient in place of the logits
or, where these are wider than the head, beside them, then the products that carry it to the hidden states and to the
head. So gradients are made while the loss is, and only scaled when the backward pass comes, as Liger-Kernel's fused
losses do it (arXiv 2410.10989).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..engine import loss as head_loss
from ..errors import HywiaError

__all__ = ["CHUNK_BYTES", "Head", "Rows", "TokenLoss", "chunks", "fused_loss", "linear_head"]

# Bytes of logits at a time, of all models together, by type of device. A GPU needs long products; a CPU is as fast with
# a tenth of them.
CHUNK_BYTES = {"cpu": 10**8, "cuda": 10**9}
_TILE = 128  # tokens: chunks are multiples of it, so that products cut them without a remainder
_BLOCK = 4096  # words or tokens that are widened to float32 at once, where that cannot be avoided

Rows = Tensor | slice  # which tokens of all; a tensor lies on the student's device


class TokenLoss(Protocol):
    """What a chunk of logits is held against."""

    def row_bytes(self) -> int:
        """Bytes a token that `losses` keeps beside the logits, and at most that many tokens come at once."""

    def losses(
        self, logits: Tensor, change: head_loss.LogitChange, rows: Rows, weight: Tensor, gradient: Tensor | None
    ) -> Tensor:
        """The loss of each token, float32; `gradient`, which may be the logits, gets that of `Σ weight·loss`."""


def linear_head(model: Any) -> nn.Linear:
    """The head of a model whose logits it gives, but for a change that `logit_change` knows.

    Raises:
        HywiaError: there is none, or it computes something else.
    """
    head_loss.check_head(model)
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise HywiaError(
            f"model: expected a head that is a torch.nn.Linear, got {type(module).__name__}; leave the head out of "
            "adapters and quantisation"
        )
    return module


@dataclass(frozen=True)
class Head:
    """A head in the dtype of its products: its own, or autocast's. Where a device gives products of 16 bits in float32,
    logits are float32: rounded to 16 bits they would move a gradient by some percent."""

    weight: Tensor  # [words, features]
    bias: Tensor | None
    change: head_loss.LogitChange

    @classmethod
    def of(cls, model: Any) -> Head:
        module = linear_head(model)
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return cls(weight.to(dtype), None if bias is None else bias.to(dtype), head_loss.logit_change(model))

    @property
    def widened(self) -> bool:
        """Whether logits are wider than what they are products of."""
        return self.weight.dtype != torch.float32 and _adds_wide(self.weight.device)

    def row_bytes(self) -> int:
        """Bytes of a token's logits."""
        return self.weight.shape[0] * (4 if self.widened else self.weight.element_size())

    def buffer(self, tokens: int) -> Tensor:
        """For logits of so many tokens."""
        dtype = torch.float32 if self.widened else self.weight.dtype
        return self.weight.new_empty((tokens, self.weight.shape[0]), dtype=dtype)

    def states(self, hidden: Tensor, rows: Rows) -> Tensor:
        chosen = hidden[rows if isinstance(rows, slice) else rows.to(hidden.device)]
        return chosen.to(self.weight.device, self.weight.dtype)

    def logits(self, states: Tensor, buffer: Tensor) -> Tensor:
        """The logits `[tokens, words]`, before the family's change, at the front of `buffer`."""
        out = buffer[: len(states)]
        if self.widened:
            _add_wide(out, states, self.weight.t(), before=0)
            return out if self.bias is None else out.add_(self.bias)
        if self.bias is None:
            return torch.mm(states, self.weight.t(), out=out)
        return torch.addmm(self.bias, states, self.weight.t(), out=out)


def fused_loss(model: Any, hidden: Tensor, weight: Tensor | None, token_loss: TokenLoss) -> Tensor:
    """`Σ_t weight_t·loss_t`, a float32 scalar on the head's device.

    It is differentiable at `hidden` and at the head's parameters, where they require it, by one backward pass. Without
    gradients (`torch.no_grad()`, or nothing requires one) none are made.

    Args:
        model: what `linear_head` takes.
        hidden: `[n, features]`.
        weight: float32 `[n]`; tokens of weight 0 are not computed. None: the mean of all, for which the host need not
            wait for the device, so that it can be captured as a CUDA graph.
        token_loss: the loss.
    """
    module = linear_head(model)
    head, parameters = Head.of(model), (module.weight, module.bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, *parameters)):
        return _FusedLoss.apply(hidden, *parameters, head, None if weight is None else weight.detach(), token_loss)
    with torch.no_grad():
        return _compute(head, hidden, weight, token_loss, (False, False, False)).loss


def chunks(tokens: int, row_bytes: int, device: torch.device) -> list[slice]:
    """The tokens in pieces of about equal length, each of at most `CHUNK_BYTES` unless one token is more."""
    most = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // row_bytes)
    if most > _TILE:
        pieces = -(-tokens // (most - most % _TILE))
        most = -(-tokens // max(1, pieces) // _TILE) * _TILE
    return [slice(at, min(at + most, tokens)) for at in range(0, tokens, max(1, most))]


@dataclass
class _Computed:
    """The loss, and the gradients that were wanted, which are to be multiplied by `scale`."""

    loss: Tensor
    scale: Tensor
    hidden: Tensor | None  # in the hidden states' dtype
    weight: Tensor | None  # float32, like the bias's
    bias: Tensor | None


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        token_weight: Tensor | None,
        token_loss: TokenLoss,
    ) -> Tensor:
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.computed = _compute(head, hidden, token_weight, token_loss, ctx.needs_input_grad[:3])
        return ctx.computed.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        made, ctx.computed = ctx.computed, None
        if made is None:
            raise HywiaError(
                "loss: expected one backward pass, got a second, and the gradients went with the first; compute the "
                "loss again"
            )
        scale = grad_output * made.scale
        of_hidden = None if made.hidden is None else _scaled(made.hidden, scale)
        of_parameters = [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip((made.weight, made.bias), ctx.dtypes, strict=True)
        ]
        return of_hidden, *of_parameters, None, None, None


def _compute(
    head: Head, hidden: Tensor, weight: Tensor | None, token_loss: TokenLoss, wanted: tuple[bool, bool, bool]
) -> _Computed:
    """The loss and the gradients of those among hidden states, weight and bias that are wanted."""
    device, hidden = head.weight.device, hidden.detach()
    rows: Tensor | None = None  # those that count; None: all
    if weight is None:
        counted = torch.full((len(hidden),), 1.0 / len(hidden), device=device)
        scale = counted[0]
    else:
        counted = weight.to(device)
        chosen_rows = counted.nonzero()[:, 0]
        if len(chosen_rows) < len(counted):
            rows, counted = chosen_rows, counted[chosen_rows]
        scale = counted.abs().max() if len(counted) else counted.new_ones(())
    # Gradients are made for the weights relative to the largest one: float16 would lose them before a loss scale comes.
    relative = counted / scale

    def sums(like: Tensor | None) -> Tensor:
        assert like is not None
        return torch.zeros_like(like, dtype=torch.float32)

    of_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
    of_weight = sums(head.weight) if wanted[1] else None
    of_bias = sums(head.bias) if wanted[2] else None
    losses = torch.empty_like(counted)
    own_bytes = head.weight.shape[0] * head.weight.element_size() if head.widened and any(wanted) else 0
    parts = chunks(len(counted), head.row_bytes() + token_loss.row_bytes() + own_bytes, device)
    longest = max((part.stop - part.start for part in parts), default=0)
    buffer = head.buffer(longest)
    # Products take the gradient in the dtype of the head.
    narrow = head.weight.new_empty((longest, head.weight.shape[0])) if own_bytes else None
    with torch.autocast(device.type, enabled=False):
        for part in parts:
            chosen: Rows = part if rows is None else rows[part]
            states = head.states(hidden, chosen)
            logits = head.logits(states, buffer)
            gradient = None if not any(wanted) else logits if narrow is None else narrow[: len(logits)]
            losses[part] = token_loss.losses(logits, head.change, chosen, relative[part], gradient)
            if gradient is None:
                continue
            if of_hidden is not None:
                there = chosen if isinstance(chosen, slice) else chosen.to(hidden.device)
                of_hidden[there] = torch.mm(gradient, head.weight).to(hidden.device, hidden.dtype)
            if of_weight is not None:
                _add_product(of_weight, gradient, states)
            if of_bias is not None:
                of_bias += gradient.sum(0, dtype=torch.float32)
    return _Computed((losses * counted).sum(), scale, of_hidden, of_weight, of_bias)


def _add_product(total: Tensor, gradient: Tensor, states: Tensor) -> None:
    """Adds `gradientᵀ·states` to float32 `total` `[words, features]`, without rounding it to a narrower dtype."""
    if gradient.dtype == torch.float32:
        total.addmm_(gradient.t(), states)
    elif _adds_wide(total.device):
        _add_wide(total, gradient.t(), states)
    else:
        wide = states.float()
        for at in range(0, len(total), _BLOCK):
            total[at : at + _BLOCK].addmm_(gradient[:, at : at + _BLOCK].t().float(), wide)


def _adds_wide(device: torch.device) -> bool:
    """Whether a product of 16-bit matrices can be added to float32 on this device."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _add_wide(total: Tensor, one: Tensor, other: Tensor, *, before: float = 1) -> None:
    """float32 `total` becomes `before` times itself and the product, not rounded, of two matrices of 16 bits."""
    torch.addmm(total, one, other, beta=before, out_dtype=torch.float32, out=total)


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """The gradient times a float32 scalar, in place; a product of a narrower tensor with it would round it first."""
    scale = scale.to(gradient.device)
    if gradient.dtype == torch.float32:
        return gradient.mul_(scale)
    for at in range(0, len(gradient), _BLOCK):
        part = gradient[at : at + _BLOCK]
        part.copy_(part.float().mul_(scale))
    return gradient

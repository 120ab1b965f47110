"""What lies between an attention's projections, written out: rotary embedding and torch's causal flash attention.

It runs the kernels that the attention module's own code would run, on the same operands, and gives the same bits. It
spares the host that code and autograd's, which on a GPU take longer than the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from .patches import reproducible
from .rotary import rotate, tables_serve

__all__ = ["FlashAttention", "FlashCore", "flash_attention"]

_OPS: Any = torch.ops.aten
# Keywords of a layer that change nothing here, whatever their values. Any other must be None or False.
_IGNORED = ("position_ids", "position_embeddings", "cache_position")


@dataclass(frozen=True)
class FlashCore:
    """One call: `out` is what leaves the attention, `[samples, tokens, heads · head_dim]`; the rest is for backward."""

    of: FlashAttention
    heads: tuple[Tensor, Tensor, Tensor]  # q and k rotated, and v: [samples, heads, tokens, head_dim]
    tables: tuple[Tensor, Tensor]
    attended: Tensor  # [samples, heads, tokens, head_dim]
    kept: tuple

    @property
    def out(self) -> Tensor:
        samples, _, tokens, _ = self.attended.shape
        return self.attended.transpose(1, 2).reshape(samples, tokens, -1)

    @property
    def value(self) -> Tensor | None:
        """The value projection's output, where the attention keeps it because no head is repeated; else None."""
        value = self.heads[2]
        if value.shape[1] != self.heads[0].shape[1]:
            return None
        return value.transpose(1, 2).reshape(value.shape[0], value.shape[2], -1)

    def backward(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients at the outputs of the projections q, k and v, from the gradient at `out`."""
        samples, tokens, _ = grad.shape
        grad = grad.view(samples, tokens, -1, self.attended.shape[-1]).transpose(1, 2)
        with reproducible(self.of.strict, cublas=False):  # dq is summed by atomic additions otherwise
            dq, dk, dv = _backward(grad, *self.heads, self.attended, self.kept, self.of.scaling)
        dq, dk = rotate(dq.transpose(1, 2), dk.transpose(1, 2), *self.tables, True)
        return tuple(x.reshape(samples, tokens, -1) for x in (dq, dk, dv.transpose(1, 2)))


@dataclass(frozen=True)
class FlashAttention:
    """Causal attention of one module.

    `strict` asks for the same bits every run. `chosen` remembers whether torch takes its flash kernel, by everything
    that this depends on; the modules of one pass share it.
    """

    head_dim: int
    scaling: float
    strict: bool
    chosen: dict[tuple, bool]

    def serves(self, made: tuple[Tensor, ...], keywords: Mapping[str, Any]) -> bool:
        """Whether the module's own code would compute with these operands what `forward` computes."""
        tables = keywords.get("position_embeddings")
        if tables is None:
            return False
        cos, sin = tables
        if not tables_serve(made[0], cos, sin, self.head_dim):
            return False
        if any(value is not None and value is not False for name, value in keywords.items() if name not in _IGNORED):
            return False  # a mask, say, or a cache
        key = (made[0].shape, made[1].shape, made[0].dtype, made[0].device, self.head_dim, self.scaling)
        if key not in self.chosen:
            self.chosen[key] = self._chooses_flash(made)
        return self.chosen[key]

    def _chooses_flash(self, made: tuple[Tensor, ...]) -> bool:
        """Whether torch would take its flash kernel, which does not depend on the values."""
        if self.head_dim % 8:
            return False  # torch pads
        q, k, v = (self._split(x).detach().requires_grad_() for x in made)
        with torch.enable_grad(), reproducible(self.strict, cublas=False):
            grouped = q.shape[1] != k.shape[1]
            choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True, scale=self.scaling, enable_gqa=grouped)
        return choice == SDPBackend.FLASH_ATTENTION.value and q.shape[2] > 1

    def _split(self, x: Tensor) -> Tensor:
        samples, tokens, _ = x.shape
        return x.view(samples, tokens, -1, self.head_dim).transpose(1, 2)

    def forward(self, made: tuple[Tensor, ...], keywords: Mapping[str, Any]) -> FlashCore:
        """Attends. `made` are the outputs of the projections q, k and v, `[samples, tokens, heads · head_dim]` each."""
        cos, sin = (table.contiguous() for table in keywords["position_embeddings"])
        samples, tokens, _ = made[0].shape
        q, k = (x.view(samples, tokens, -1, self.head_dim) for x in made[:2])
        q, k = rotate(q, k, cos, sin, False)
        heads = (q.transpose(1, 2), k.transpose(1, 2), self._split(made[2]))
        attended, kept = _forward(*heads, self.scaling)
        return FlashCore(self, heads, (cos, sin), attended, kept)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, tuple]:
    """Returns the output `[samples, heads, tokens, head_dim]` and what `_backward` takes as `kept`."""
    if q.device.type == "cuda":
        out, *kept, _ = _OPS._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    else:
        out, *kept = _OPS._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    return out, tuple(kept)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: tuple, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cuda":
        *sizes, seed, offset = kept
        of_dropout = 0.0, True, seed, offset
        return _OPS._scaled_dot_product_flash_attention_backward(grad, q, k, v, out, *sizes, *of_dropout, scale=scale)
    return _OPS._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, *kept, 0.0, True, scale=scale)


def flash_attention(attention: Any, strict: bool, chosen: dict[tuple, bool]) -> FlashAttention | None:
    """The attention of a module whose code is known to be `o(attend(rotate(q), rotate(k), v))`; None where something
    else than torch's causal attention runs in it.

    A sliding window is a mask to torch; `serves` refuses calls with one. Texts no longer than the window have no mask.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if attention.config._attn_implementation != "sdpa" or not attention.is_causal:
        return None
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:  # somebody's own
        return None
    return FlashAttention(attention.head_dim, attention.scaling, strict, chosen)

"""Attention of one new token over a static cache: what a decoding step needs, at the speed of reading the cache.

PyTorch's masked attention gives one block to a head, which reads its whole cache alone: 16 of 132 multiprocessors for
one sequence of 16 heads. Here the cache is cut into pieces of `BLOCK` tokens, and the pieces' results are joined. Of
many sequences there are programs enough: one for all query heads of a KV head reads its cache once, up to the token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.precision import tf32

__all__ = ["decode_attention"]

BLOCK = 64
MANY = 2048  # KV heads of all sequences from which each is one program's
_SMALL_BLOCK = 32  # tokens at a time there
_LEAST = 16  # rows, and columns, that a product on the tensor cores has at least


@triton.jit
def _pieces(
    query, keys, values, position, out, top, total, heads, shared, length, scale, D: tl.constexpr, BLOCK: tl.constexpr
):
    """One piece of one query head: `Σ p·v`, the largest score and `Σ p`, with `p = exp(score - largest)`."""
    row = tl.program_id(0)  # sequence · heads + head
    piece = tl.program_id(1)
    cache = ((row // heads) * (heads // shared) + (row % heads) // shared).to(tl.int64)
    token = piece * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, D)
    offsets = cache * length * D + token[:, None].to(tl.int64) * D + lane[None, :]
    last = tl.load(position)
    inside = (token <= last)[:, None]
    q = tl.load(query + row * D + lane).to(tl.float32)
    k = tl.load(keys + offsets, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(values + offsets, mask=inside, other=0.0).to(tl.float32)
    score = tl.sum(q[None, :] * k, axis=1) * scale
    score = tl.where(token <= last, score, -1e30)
    largest = tl.max(score, axis=0)
    p = tl.where(score > -1e30, tl.exp(score - largest), 0.0)
    slot = row * tl.num_programs(1) + piece
    tl.store(out + slot * D + lane, tl.sum(p[:, None] * v, axis=0))
    tl.store(top + slot, largest)
    tl.store(total + slot, tl.sum(p, axis=0))


@triton.jit
def _whole(
    query, keys, values, position, out, shared, length, scale,
    D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, FLOAT32: tl.constexpr,
):  # fmt: skip
    """All of one KV head's query heads, padded to `HEADS`, which a product takes: softmax as the tokens come."""
    row = tl.program_id(0)  # sequence · KV heads + KV head
    head = tl.arange(0, HEADS)
    lane = tl.arange(0, D)
    queries = (row * shared + head[:, None]) * D + lane[None, :]
    there = (head < shared)[:, None]
    q = tl.load(query + queries, mask=there, other=0.0)
    last = tl.load(position)
    first = row.to(tl.int64) * length * D
    top = tl.full([HEADS], -1e30, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    sums = tl.zeros([HEADS, D], tl.float32)
    for start in range(0, last + 1, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token <= last
        k = tl.load(keys + first + token[None, :] * D + lane[:, None], mask=inside[None, :], other=0.0)
        v = tl.load(values + first + token[:, None] * D + lane[None, :], mask=inside[:, None], other=0.0)
        score = tl.dot(q, k, input_precision=FLOAT32) * scale
        score = tl.where(inside[None, :], score, -1e30)
        largest = tl.maximum(top, tl.max(score, axis=1))
        shrink = tl.exp(top - largest)
        p = tl.exp(score - largest[:, None])
        sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=FLOAT32)
        total = total * shrink + tl.sum(p, axis=1)
        top = largest
    tl.store(out + queries, (sums / total[:, None]).to(out.dtype.element_ty), mask=there)


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float) -> Tensor:
    """`softmax(scale · q·kᵀ)·v` over the tokens up to `position`.

    Args:
        query: `[batch, heads, 1, head_dim]`. keys, values: `[batch, kv_heads, length, head_dim]`. All contiguous;
            a KV head serves consecutive query heads. head_dim must be a power of two.
        position: int64 `[1]`, on the same device.

    Returns:
        `[batch, heads, 1, head_dim]` in the query's dtype; sums in float32, float32's products as the process makes
        those of matrices: in float32, or in TF32.
    """
    batch, heads, _, size = query.shape
    kv_heads, length = keys.shape[1:3]
    if batch * kv_heads >= MANY and size >= _LEAST:
        out, shared = torch.empty_like(query), heads // kv_heads
        _whole[(batch * kv_heads,)](
            query, keys, values, position, out, shared, length, scale, D=size,
            HEADS=max(_LEAST, triton.next_power_of_2(shared)), BLOCK=_SMALL_BLOCK,
            FLOAT32="tf32" if tf32() else "ieee", num_warps=2,
        )  # fmt: skip
        return out
    pieces = triton.cdiv(length, BLOCK)
    rows = batch * heads
    out = torch.empty((rows, pieces, size), dtype=torch.float32, device=query.device)
    top = torch.empty((rows, pieces), dtype=torch.float32, device=query.device)
    total = torch.empty((rows, pieces), dtype=torch.float32, device=query.device)
    _pieces[(rows, pieces)](
        query, keys, values, position, out, top, total, heads, heads // kv_heads, length, scale, D=size,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    weight = torch.exp(top - top.amax(1, keepdim=True))
    joined = (out * weight[..., None]).sum(1) / (total * weight).sum(1, keepdim=True)
    return joined.to(query.dtype).view(batch, heads, 1, size)

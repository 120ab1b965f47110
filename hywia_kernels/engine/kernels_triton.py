"""Triton: RMS norm, the SiLU-gated product and rotary embedding, forward and backward, one launch each.

Values are rounded where Hugging Face's eager code and its backward round them, so that a model gives the same bits: in
low precision one bit that differs becomes a whole rounding step a few layers on. Sums over a row are torch's own, since
their order is; multiplications and additions must not be contracted (`enable_fp_fusion=False`).
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def norm_squares(x, squares, columns, BLOCK: tl.constexpr):
    """`x²` in float32; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    value = tl.load(x + row * columns + at, mask, 0.0).to(tl.float32)
    tl.store(squares + row * columns + at, value * value, mask)


@triton.jit
def _inverse_root(x, EXACT: tl.constexpr):
    """`1/√x`, with EXACT by CUDA's own `rsqrtf`, which the interpreter lacks."""
    if EXACT:
        return libdevice.rsqrt(x)
    else:
        return tl.rsqrt(x)


@triton.jit
def norm_forward(x, mean, weight, y, columns, eps, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """`y = weight · round(x / rms(x))`, with `mean` the mean of `x²`, float32, one a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    value = tl.load(x + row * columns + at, mask, 0.0).to(tl.float32)
    normal = (value * _inverse_root(tl.load(mean + row) + eps, EXACT)).to(y.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + at, mask, 0.0).to(tl.float32)
    tl.store(y + row * columns + at, (normal * w).to(y.dtype.element_ty), mask)


@triton.jit
def norm_products(dy, x, weight, products, columns, BLOCK: tl.constexpr):
    """`g·x` in float32, with `g = round(dy·weight)`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    value = tl.load(x + row * columns + at, mask, 0.0).to(tl.float32)
    w = tl.load(weight + at, mask, 0.0).to(tl.float32)
    g = (tl.load(dy + row * columns + at, mask, 0.0).to(tl.float32) * w).to(x.dtype.element_ty).to(tl.float32)
    tl.store(products + row * columns + at, g * value, mask)


@triton.jit
def norm_backward(dy, x, mean, along, weight, dx, columns, eps, share, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """`dx = g·r − x·r³·mean(g·x)` with `r = 1/rms(x)`, `along = Σ g·x` and `share = 1/columns`; products and sums
    rounded one by one and in the order of autograd's own chain of operations."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    value = tl.load(x + row * columns + at, mask, 0.0).to(tl.float32)
    w = tl.load(weight + at, mask, 0.0).to(tl.float32)
    g = (tl.load(dy + row * columns + at, mask, 0.0).to(tl.float32) * w).to(dx.dtype.element_ty).to(tl.float32)
    r = _inverse_root(tl.load(mean + row) + eps, EXACT)
    slope = (-0.5 * tl.load(along + row)) * (r * r * r) * share
    tl.store(dx + row * columns + at, (g * r + slope * (2.0 * value)).to(dx.dtype.element_ty), mask)


@triton.jit
def _one_plus_exp(x, EXACT: tl.constexpr):
    """`1 + exp(−x)`, with EXACT by CUDA's own `expf`, which the interpreter lacks."""
    if EXACT:
        return 1.0 + libdevice.exp(-x)
    else:
        return 1.0 + tl.exp(-x)


@triton.jit
def gate_forward(gate, up, y, count, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """`y = round(silu(gate)) · up`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    g = tl.load(gate + at, mask, 0.0).to(tl.float32)
    u = tl.load(up + at, mask, 0.0).to(tl.float32)
    activated = tl.div_rn(g, _one_plus_exp(g, EXACT)).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, (activated * u).to(y.dtype.element_ty), mask)


@triton.jit
def gate_backward(dy, gate, up, dgate, dup, count, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """`dgate = round(dy·up)·silu'(gate)`, `dup = dy·round(silu(gate))`. `dup` may be `dy` itself."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    d = tl.load(dy + at, mask, 0.0).to(tl.float32)
    g = tl.load(gate + at, mask, 0.0).to(tl.float32)
    u = tl.load(up + at, mask, 0.0).to(tl.float32)
    below = _one_plus_exp(g, EXACT)
    activated = tl.div_rn(g, below).to(dup.dtype.element_ty).to(tl.float32)
    tl.store(dup + at, (d * activated).to(dup.dtype.element_ty), mask)
    da = (d * u).to(dgate.dtype.element_ty).to(tl.float32)
    sigmoid = tl.div_rn(1.0 + tl.zeros_like(below), below)
    tl.store(dgate + at, (da * sigmoid * tl.fma(g, 1.0 - sigmoid, 1.0)).to(dgate.dtype.element_ty), mask)


@triton.jit
def _rotate(
    x, y, cos, sin, token, at_table, heads, half, BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):
    """All heads of one token; `x` and `y` are `[tokens, heads, 2·half]`."""
    dtype = y.dtype.element_ty
    column = tl.arange(0, HALF)
    inside = column < half
    at = at_table * 2 * half + column
    c1 = tl.load(cos + at, inside, 0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + at + half, inside, 0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + at, inside, 0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + at + half, inside, 0.0).to(tl.float32)[None, :]
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        mask = (head < heads)[:, None] & inside[None, :]
        where = (token * heads + head)[:, None] * 2 * half + column[None, :]
        x1 = tl.load(x + where, mask, 0.0).to(tl.float32)
        x2 = tl.load(x + where + half, mask, 0.0).to(tl.float32)
        if BACKWARD:
            a, b = x2 * s2, -(x1 * s1)
        else:
            a, b = -x2 * s1, x1 * s2
        y1 = (x1 * c1).to(dtype).to(tl.float32) + a.to(dtype).to(tl.float32)
        y2 = (x2 * c2).to(dtype).to(tl.float32) + b.to(dtype).to(tl.float32)
        tl.store(y + where, y1.to(dtype), mask)
        tl.store(y + where + half, y2.to(dtype), mask)


@triton.jit
def rotary(
    q,
    k,
    q_out,
    k_out,
    cos,
    sin,
    table_rows,
    q_heads,
    k_heads,
    half,
    BACKWARD: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """`x·cos + rotate_half(x)·sin` of queries (second index 0) and keys (1), or its adjoint; one program a token."""
    token = tl.program_id(0).to(tl.int64)
    at_table = token % table_rows
    if tl.program_id(1) == 0:
        _rotate(q, q_out, cos, sin, token, at_table, q_heads, half, BACKWARD, HEADS, HALF)
    else:
        _rotate(k, k_out, cos, sin, token, at_table, k_heads, half, BACKWARD, HEADS, HALF)

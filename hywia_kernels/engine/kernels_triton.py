"""Triton: RMS norm and the SiLU-gated product, forward and backward, one launch each.

Values are rounded to the operands' dtype where Hugging Face's eager code rounds them, so that a model's forward differs
from it by no more than the order of one sum.
"""

import triton
import triton.language as tl


@triton.jit
def norm_forward(x, weight, y, columns, eps, BLOCK: tl.constexpr):
    """`y = weight · round(x / rms(x))`; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    value = tl.load(x + row * columns + at, mask, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / columns + eps)
    normal = (value * scale).to(y.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + at, mask, 0.0).to(tl.float32)
    tl.store(y + row * columns + at, (normal * w).to(y.dtype.element_ty), mask)


@triton.jit
def norm_backward(dy, x, weight, dx, columns, eps, BLOCK: tl.constexpr):
    """`dx = r·g − x·r³·mean(g·x)` with `g = round(dy·weight)` and `r = 1/rms(x)`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    value = tl.load(x + row * columns + at, mask, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / columns + eps)
    w = tl.load(weight + at, mask, 0.0).to(tl.float32)
    g = (tl.load(dy + row * columns + at, mask, 0.0).to(tl.float32) * w).to(dx.dtype.element_ty).to(tl.float32)
    along = tl.sum(g * value, 0) / columns
    result = scale * g - value * (scale * scale * scale * along)
    tl.store(dx + row * columns + at, result.to(dx.dtype.element_ty), mask)


@triton.jit
def gate_forward(gate, up, y, count, BLOCK: tl.constexpr):
    """`y = round(silu(gate)) · up`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    g = tl.load(gate + at, mask, 0.0).to(tl.float32)
    u = tl.load(up + at, mask, 0.0).to(tl.float32)
    activated = (g / (1.0 + tl.exp(-g))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, (activated * u).to(y.dtype.element_ty), mask)


@triton.jit
def gate_backward(dy, gate, up, dgate, dup, count, BLOCK: tl.constexpr):
    """`dgate = round(dy·up)·silu'(gate)`, `dup = dy·round(silu(gate))`. `dup` may be `dy` itself."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    d = tl.load(dy + at, mask, 0.0).to(tl.float32)
    g = tl.load(gate + at, mask, 0.0).to(tl.float32)
    u = tl.load(up + at, mask, 0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    activated = (g * sigmoid).to(dup.dtype.element_ty).to(tl.float32)
    tl.store(dup + at, (d * activated).to(dup.dtype.element_ty), mask)
    da = (d * u).to(dgate.dtype.element_ty).to(tl.float32)
    slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(dgate + at, (da * slope).to(dgate.dtype.element_ty), mask)

"""Attention of one new token on a CUDA device, in every dtype and product."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from hywia_kernels.ops.precision import full_float32, tensor_float32

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize(
    ("dtype", "precision", "allowed"),
    [
        (torch.float32, lambda: full_float32("cuda"), 1e-5),
        (torch.float32, tensor_float32, 3e-3),
        (torch.bfloat16, nullcontext, 2e-2),
        (torch.float16, nullcontext, 3e-3),
    ],
    ids=["float32", "TF32", "bfloat16", "float16"],
)
@pytest.mark.parametrize("batch", [1, 1024], ids=["pieces", "a program a KV head"])
@pytest.mark.parametrize(("heads", "shared", "size"), [(9, 3, 64), (32, 32, 128), (4, 1, 32)], ids=str)
def test_decode_attention(dtype, precision, allowed, batch, heads, shared, size):
    from hywia_kernels.engine.decode_attention import decode_attention

    if heads == 32 and batch == 1024:
        batch = 128
    length, position = 96, 70
    generator = torch.Generator("cuda").manual_seed(size)

    def made(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    query, keys, values = (
        made(batch, heads, 1, size),
        made(batch, shared, length, size),
        made(batch, shared, length, size),
    )
    seen = (keys[:, :, : position + 1].double(), values[:, :, : position + 1].double())
    want = torch.nn.functional.scaled_dot_product_attention(query.double(), *seen, scale=0.3, enable_gqa=True)
    keys[:, :, position + 1 :] = torch.nan
    with precision():
        got = decode_attention(query, keys, values, torch.tensor([position], device="cuda"), 0.3)
    assert got.dtype == dtype
    assert float((got.double() - want).abs().max()) <= allowed * float(want.abs().max())

"""`taylor_importance_batch` on a GPU at the sizes of real models, and the columns' counters."""

from __future__ import annotations

import pytest
import torch

from hywia_kernels import ops
from hywia_kernels.ops import reference
from hywia_kernels.ops.checks import ORDERS
from tests.support.batches import assert_right, attention, made, mlp, raw, scales
from tests.support.operands import bits, need
from tests.support.tolerances import TAYLOR, error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]

OP = "taylor_importance_batch"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
gpu_backends = pytest.mark.parametrize("backend", ["triton", "cuda"])
# 8 KV groups of 4 query heads of 64, and an MLP of odd width.
LAYER = [*attention(1024, 256, 64, kv_heads=8, result=0), *mlp(1024, 2752, result=1)]


@gpu_backends
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (BF16, F32, F32), (F16, F16, F32), (F32, F32, F32)], ids=str)
def test_a_layer(backend, order, dtypes):
    need(backend, OP)
    call = made(LAYER, order, "cuda", dtypes)
    first = assert_right(backend, call)
    for (fine, signed), (fine_again, signed_again) in zip(first, raw(backend, call), strict=True):
        assert torch.equal(bits(fine), bits(fine_again))
        assert torch.equal(bits(signed), bits(signed_again))


@gpu_backends
def test_mixed_dtypes_and_layouts(backend):
    """One result of 16-byte words, one that is not; a result of more matrices than one launch takes."""
    need(backend, OP)
    many = [(64, 256, 0, 1, 0)] * 30 + [(256, 64, 1, 1, 0)] * 3 + [(33, 100, 0, 1, 1), (96, 40, 0, 8, 2)]
    calls = [made(many, "mixed", "cuda", dtypes, seed=9) for dtypes in ((BF16, F32, F32), (F32, F32, F32))]
    mixed = calls[0]._replace(
        weights=[calls[i % 2].weights[i] for i in range(len(many))],
        grads=[calls[0].grads[i].t().contiguous().t() if i % 5 == 0 else calls[0].grads[i] for i in range(len(many))],
    )
    assert_right(backend, mixed)
    for got, want, scale in zip(raw(backend, mixed, 3.0), raw(backend, mixed), scales(mixed), strict=True):
        assert error(got[0], want[0].double() + 3.0, scale + 3.0) <= TAYLOR[F32]
        assert error(got[1], want[1].double() + 3.0, scale + 3.0) <= TAYLOR[F32]


@pytest.mark.parametrize("group_size", [1, 8, 32, 128, 136])
@pytest.mark.parametrize("shape", [(4096, 4352), (9, 136), (131072, 272), (700, 34816)], ids=str)
def test_columns_of_many_shapes(shape, group_size):
    """Strips with a tail, a single piece, hundreds of pieces, more strips than the GPU holds blocks."""
    need("cuda", "taylor_importance")
    if shape[1] % group_size:
        pytest.skip(f"{group_size} does not divide {shape[1]}")
    for dtypes in ((BF16, BF16), (F32, F32), (F16, F32)):
        weight, grad = (torch.randn(shape, device="cuda").to(d) for d in dtypes)
        fine, signed = reference.taylor_importance_fp64(weight, grad, None, 1, "first", group_size)
        for _ in range(2):
            got = ops.taylor_importance(weight, grad, axis=1, group_size=group_size, backend="cuda")
            assert error(got.fine, fine, fine) <= TAYLOR[F32]
            assert error(got.signed, signed, fine) <= TAYLOR[F32]


def test_columns_on_many_streams():
    """Each stream counts its own blocks, whatever else runs."""
    need("cuda", "taylor_importance")
    weight, grad = (torch.randn(4096, 4096, device="cuda").bfloat16() for _ in range(2))
    want = ops.taylor_importance(weight, grad, axis=1, backend="cuda")
    torch.cuda.synchronize()
    results = []
    for _ in range(4):
        for stream in [torch.cuda.Stream() for _ in range(3)]:
            with torch.cuda.stream(stream):
                results.append(ops.taylor_importance(weight, grad, axis=1, backend="cuda"))
    torch.cuda.synchronize()
    assert len(results) == 12
    assert all(torch.equal(r.fine, want.fine) and torch.equal(r.signed, want.signed) for r in results)


def test_columns_in_a_cuda_graph():
    """A capture keeps counters of its own; replays and eager calls give the same bits."""
    need("cuda", "taylor_importance")
    weight, grad = (torch.randn(4096, 4096, device="cuda").bfloat16() for _ in range(2))
    want = ops.taylor_importance(weight, grad, axis=1, backend="cuda")
    batch = ops.taylor_importance_batch([weight, weight], [grad, grad], axes=[0, 1], into=[0, 0], backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.taylor_importance(weight, grad, axis=1, backend="cuda")
        both = ops.taylor_importance_batch([weight, weight], [grad, grad], axes=[0, 1], into=[0, 0], backend="cuda")
    for _ in range(3):
        graph.replay()
        eager = ops.taylor_importance(weight, grad, axis=1, backend="cuda")
        torch.cuda.synchronize()
        assert torch.equal(got.fine, want.fine)
        assert torch.equal(eager.signed, want.signed)
        assert torch.equal(both[0].fine, batch[0].fine)
        got.fine.zero_(), both[0].fine.zero_()

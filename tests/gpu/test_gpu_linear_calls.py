"""`linear_importance` on the GPU however it is called: streams, devices, graphs, and every way that is compiled."""

from __future__ import annotations

import pytest
import torch

from hywia_kernels import BackendError, ops
from hywia_kernels.ops import cuda_linear, reference
from tests.support.operands import bits, need

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]

BF16, F16 = torch.bfloat16, torch.float16
gpu_backends = pytest.mark.parametrize("backend", ["triton", "cuda"])
axes = pytest.mark.parametrize("axis", [0, 1])
EQUAL = list(range(0, 1281, 128))
RAGGED = [0, 100, 260, 377, 512, 640, 641, 829, 1000, 1180, 1280]
limits = pytest.mark.parametrize("offsets", [EQUAL, RAGGED], ids=["equal", "ragged"])
GATE = 1e-5  # see test_gpu_linear
DEVICE = "cuda"


def operands(shape, tokens=1280, dtype=BF16, seed=0, device=DEVICE):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    made = (
        scale * torch.randn(size, generator=generator, device=DEVICE)
        for scale, size in ((1e-3, (tokens, shape[0])), (1.0, (tokens, shape[1])), (0.02, shape))
    )
    return tuple(x.to(dtype).to(device) for x in made)


def wanted(made, offsets, axis, order):
    return reference.linear_importance_fp64(*made, offsets, axis, order, 1, True, 1.0)


def assert_right(got, made, offsets, axis, order):
    fine, coarse = wanted(made, offsets, axis, order)
    size = wanted(made, offsets, axis, "first")[0]
    if order == "all":
        fine, found = fine[:2], got.fine[:2]  # the third nearly cancels; test_gpu_linear holds it to its magnitude
    else:
        found = got.fine
    assert float(((found - fine).abs() / fine).max()) <= GATE
    # A sample's signed sum is of a tenth of the tokens, and cancels: held to the whole unit's magnitude.
    assert float(((got.coarse - coarse).abs() / size).max()) <= 10 * GATE


@axes
@limits
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(4096, 1104), (256, 512), (136, 264)], ids=str)
def test_second_order_is_right_and_the_same_again(shape, dtype, offsets, axis):
    need("cuda", "linear_importance")
    made = operands(shape, dtype=dtype, seed=1)
    options = {"samples": offsets, "axis": axis, "order": "second", "backend": "cuda"}
    got, again = (ops.linear_importance(*made, **options) for _ in range(2))
    assert torch.equal(bits(got.fine), bits(again.fine))
    assert torch.equal(bits(got.coarse), bits(again.coarse))
    assert_right(got, made, offsets, axis, "second")


@pytest.mark.parametrize("order", ["second", "all", "first"])
@pytest.mark.parametrize("table_bytes", [1, 8 << 20, 512 << 20])
def test_many_samples_by_every_cut(monkeypatch, order, table_bytes):
    """However many clusters share a row of tiles, down to one."""
    need("cuda", "linear_importance")
    monkeypatch.setattr(cuda_linear, "_TABLE_BYTES", table_bytes)
    made = operands((1408, 2048), tokens=512 * 24, seed=3)
    offsets = list(range(0, 512 * 24 + 1, 24))
    got = ops.linear_importance(*made, samples=512, axis=0, order=order, backend="cuda")
    fine, coarse = wanted(made, offsets, 0, order)
    rows = fine[:2] if order == "all" else fine
    assert float(((got.fine[: len(rows)] - rows).abs() / rows).max()) <= GATE
    assert float((got.coarse - coarse).abs().max() / coarse.abs().max()) <= GATE


@gpu_backends
@limits
@pytest.mark.parametrize("order", ["second", "all"])
def test_work_stays_on_the_current_stream(backend, offsets, order):
    """The operands arrive late on a side stream; a launch on another stream would read the zeros before them."""
    need(backend, "linear_importance")
    made = operands((1024, 768), seed=4)
    options = {"samples": offsets, "axis": 0, "order": order, "backend": backend}
    want = ops.linear_importance(*made, **options)  # compiled before it matters
    late = [torch.zeros_like(x) for x in made]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for to, x in zip(late, made, strict=True):
            to.copy_(x)
        got = ops.linear_importance(*late, **options)
    stream.synchronize()
    assert torch.equal(bits(got.fine), bits(want.fine))
    assert torch.equal(bits(got.coarse), bits(want.coarse))


@gpu_backends
@limits
def test_a_gpu_that_is_not_the_current_one(backend, offsets):
    need(backend, "linear_importance")
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    made = operands((1024, 768), seed=5, device="cuda:1")
    with torch.cuda.device(0):
        got = ops.linear_importance(*made, samples=offsets, axis=1, order="all", backend=backend)
    assert got.fine.device == made[0].device
    assert_right(got, made, offsets, 1, "all")


@gpu_backends
@limits
@pytest.mark.parametrize("order", ["second", "all"])
def test_a_graph_is_replayed_on_new_operands(backend, offsets, order):
    need(backend, "linear_importance")
    made = operands((512, 768), seed=6)
    options = {"samples": offsets, "axis": 0, "order": order, "backend": backend}
    for x in made:
        x.copy_(x)
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        ops.linear_importance(*made, **options)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.linear_importance(*made, **options)
    for x, new in zip(made, operands((512, 768), seed=7), strict=True):
        x.copy_(new)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    want = ops.linear_importance(*made, **options)
    assert torch.equal(bits(got.fine), bits(want.fine))
    assert torch.equal(bits(got.coarse), bits(want.coarse))


def test_limits_that_a_capture_would_have_to_copy_are_refused():
    need("cuda", "linear_importance")
    made = operands((512, 768), seed=8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(BackendError, match="run the call once before it is captured"):
        ops.linear_importance(*made, samples=[0, 333, 1280], axis=0, order="second", backend="cuda")

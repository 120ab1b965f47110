"""The CPU kernels under pytest-benchmark: `pytest benchmarks`. Not part of the default test run."""

from __future__ import annotations

import pytest
import torch

from hywia_kernels import ops

from . import bench_compact, bench_taylor
from .cases import SHORT, CompactCase, TaylorCase

pytestmark = pytest.mark.skipif(
    not next(state.on for state in ops.availability() if state.name == "native"), reason="no CPU extension"
)
CPU = torch.device("cpu")
SHAPES = ((1536, 576), (2048, 2048))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TAYLOR = [
    TaylorCase(*shape, axis, order, dtype)
    for shape in SHAPES
    for dtype in DTYPES
    for order in ("first", "mixed")
    for axis in (0, 1)
] + [TaylorCase(2048, 2048, axis, "mixed", group_size=64) for axis in (0, 1)]
LAYERS = ((192, 576), (576, 576), (1536, 576), (576, 1536))  # SmolLM2-135M
SAMPLES, TOKENS = 10, 128
LINEAR = [(shape, axis, order) for shape in LAYERS for axis in (0, 1) for order in ("first", "all")]
COMPACT = [CompactCase(*shape, axis, dtype) for shape in SHAPES for dtype in DTYPES[:2] for axis in (0, 1)]


@pytest.fixture(autouse=True)
def inputs():
    torch.manual_seed(0)


@pytest.mark.parametrize("case", TAYLOR, ids=lambda case: case.name.replace(" ", "-"))
@pytest.mark.benchmark(group="taylor_importance")
def test_taylor_importance(benchmark, case):
    tensors = bench_taylor.operands(case, CPU)
    result = benchmark(
        ops.taylor_importance,
        *tensors,
        axis=case.axis,
        order=case.order,
        group_size=case.group_size,
        backend="native",
    )
    benchmark.extra_info.update(bytes=case.bytes, threads=torch.get_num_threads())
    assert bench_taylor.largest_error(result, bench_taylor.reference(case, tensors)) <= bench_taylor.TOLERANCE


def activations(shape, dtype):
    """Output gradient, input and weight of one layer."""
    rows, columns = shape
    return tuple(torch.randn(size).to(dtype) for size in ((SAMPLES * TOKENS, rows), (SAMPLES * TOKENS, columns), shape))


def linear_name(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: SHORT[dtype])
@pytest.mark.parametrize(("shape", "axis", "order"), LINEAR, ids=linear_name)
@pytest.mark.benchmark(group="linear_importance")
def test_linear_importance(benchmark, shape, axis, order, dtype):
    tensors = activations(shape, dtype)
    result = benchmark(ops.linear_importance, *tensors, samples=SAMPLES, axis=axis, order=order, backend="native")
    flops = 2 * SAMPLES * TOKENS * shape[0] * shape[1]
    benchmark.extra_info.update(flops=flops, threads=torch.get_num_threads())
    expected = ops.linear_importance(*tensors, samples=SAMPLES, axis=axis, order=order, backend="reference")
    assert float(((result.fine - expected.fine).abs() / expected.fine).max()) <= 1e-5
    assert float(((result.coarse - expected.coarse).abs()).max() / expected.coarse.abs().mean()) <= 1e-4


@pytest.mark.parametrize("shape", LAYERS, ids=linear_name)
@pytest.mark.benchmark(group="linear_importance")
def test_product_over_all_tokens(benchmark, shape):
    """What the op cannot beat: as many operations in one float32 product, and nothing reduced."""
    dy, x, _ = activations(shape, torch.float32)
    out = torch.empty(shape)
    benchmark(torch.mm, dy.t(), x, out=out)
    benchmark.extra_info.update(flops=2 * SAMPLES * TOKENS * shape[0] * shape[1], threads=torch.get_num_threads())
    torch.testing.assert_close(out.double(), dy.double().t() @ x.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", COMPACT, ids=lambda case: case.name.replace(" ", "-"))
@pytest.mark.benchmark(group="compact")
def test_compact(benchmark, case):
    weight, keep = bench_compact.operands(case, CPU)
    result = benchmark(ops.compact, weight, keep, case.axis, backend="native")
    benchmark.extra_info.update(bytes=case.bytes, threads=torch.get_num_threads())
    assert torch.equal(result, bench_compact.reference(weight, keep, case.axis))


@pytest.mark.parametrize("units", [1536, 1 << 16])
@pytest.mark.benchmark(group="attention_fusion")
def test_attention_fusion(benchmark, units):
    fine, coarse = torch.rand(2, units).unbind()
    result = benchmark(ops.attention_fusion, fine, coarse, backend="native")
    expected = ops.attention_fusion(fine, coarse, backend="reference")
    torch.testing.assert_close(result.score, expected.score, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.weight, expected.weight, rtol=1e-4, atol=1e-5)

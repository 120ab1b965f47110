"""The CPU kernels under pytest-benchmark: `pytest benchmarks`. Not part of the default test run."""

from __future__ import annotations

import pytest
import torch

from hywia_kernels import ops

from . import bench_compact, bench_taylor
from .cases import CompactCase, TaylorCase

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

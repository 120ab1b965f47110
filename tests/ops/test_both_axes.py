"""`taylor_importance_both`: what `taylor_importance` says along each axis, from one read."""

from __future__ import annotations

import pytest
import torch

from hywia_kernels import BackendError, UsageError, ops
from hywia_kernels.ops import both_axes, reference
from hywia_kernels.ops.checks import ORDERS
from tests.support.operands import bits, matrix, need
from tests.support.tolerances import TAYLOR, error, magnitude

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def operands(shape, order, device="cpu", dtypes=(F32, F32, F32), layout="contiguous"):
    weight, grad, fisher = (matrix(shape, d, layout, i, device) for i, d in enumerate(dtypes))
    return weight, None if order == "second" else grad, None if order == "first" else fisher.abs()


def assert_both(got, given, order):
    for axis, sums in enumerate(got):
        call = (*given, axis, order, 1)
        want = reference.taylor_importance_fp64(*call)
        scale = magnitude(*call)
        for out, ref in zip(sums, want, strict=True):
            assert out.dtype == F32
            assert error(out, ref, scale) <= TAYLOR[given[0].dtype]


@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (33, 130), (70, 1030)], ids=str)
def test_both_axes(backend, order, shape):
    device = need(backend, "taylor_importance")
    given = operands(shape, order, device)
    assert_both(ops.taylor_importance_both(*given, order=order, backend=backend), given, order)


@pytest.mark.parametrize("layout", ["transposed", "stepped", "padded", "one-row", "one-element"])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_layouts_and_dtypes(backend, layout):
    device = need(backend, "taylor_importance")
    given = operands((34, 131), "mixed", device, (BF16, F32, F16), layout)
    assert_both(ops.taylor_importance_both(*given, order="mixed", backend=backend), given, "mixed")


def test_bands_that_do_not_divide_the_rows(monkeypatch):
    monkeypatch.setitem(both_axes._BAND_BYTES, "cpu", 5 * 2 * 4 * 11)  # five rows of two operands
    given = operands((23, 11), "first")
    calls = []
    run = both_axes.registry.implementation("taylor_importance", None, *given)
    monkeypatch.setattr(
        both_axes.registry,
        "implementation",
        lambda *_: lambda *a: (calls.append((a[0].weight.shape[0], a[0].axis)), run(*a)),
    )
    assert_both(ops.taylor_importance_both(*given), given, "first")
    assert calls == [(n, axis) for n in (5, 5, 5, 5, 3) for axis in (0, 1)]


def test_the_same_bits_every_time():
    given = operands((300, 200), "mixed")
    first, second = (ops.taylor_importance_both(*given, order="mixed") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_empty(shape):
    weight = torch.empty(shape)
    (fine, _), (column_fine, _) = ops.taylor_importance_both(weight, weight)
    assert fine.tolist() == [0.0] * shape[0]
    assert column_fine.tolist() == [0.0] * shape[1]


def test_errors_name_the_argument():
    weight = torch.ones(3, 4)
    with pytest.raises(UsageError, match=r"grad: expected the weight's shape \[3, 4\]"):
        ops.taylor_importance_both(weight, torch.ones(4, 3))
    with pytest.raises(UsageError, match="fisher: expected a tensor for order='second'"):
        ops.taylor_importance_both(weight, None, order="second")
    with pytest.raises(BackendError, match="expected one of reference"):
        ops.taylor_importance_both(weight, weight, backend="metal")

"""Every backend against the float64 reference, and what the contract promises beyond closeness."""

from __future__ import annotations

import pytest
import torch
from operands import cases, generator, guarded, matrix, need, raw_taylor, run_examples, untouched, whole_numbers
from tolerances import TAYLOR, assert_sums, error, magnitude

from hywia_kernels import ops
from hywia_kernels.ops import BACKENDS, reference
from hywia_kernels.ops.checks import DTYPES, ORDERS
from hywia_kernels.ops.registry import implementation
from hywia_kernels.selection import top_units

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
OP = "taylor_importance"


def dtypes_of(backend):
    """The CUDA kernels take the gradient and the Fisher information in the weight's dtype or in float32."""
    return (torch.float32,) if backend == "cuda" else DTYPES


def operands(shape, order="mixed", seed=0, device="cpu", dtype=torch.float32):
    """Contiguous (weight, grad, fisher), of which `order` reads some."""
    weight, grad, fisher = (matrix(shape, dtype, "contiguous", seed + i, device) for i in range(3))
    return weight, None if order == "second" else grad, None if order == "first" else fisher


def test_random_matrices(backend):
    """Shapes, dtypes of each operand, layouts, axes, orders and group sizes, on outputs full of NaN."""
    device = need(backend, OP)

    def check(case):
        weight, grad, fisher = case.build(device)
        arguments = (weight, grad, fisher, case.axis, case.order, case.group_size)
        fine, signed = raw_taylor(backend, *arguments)
        assert_sums(fine, signed, reference.taylor_importance_fp64(*arguments), magnitude(*arguments), weight.dtype)

    run_examples(backend, cases(dtypes_of(backend)), check)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("order", ORDERS)
def test_whole_numbers_are_exact(backend, axis, order):
    """Sums that no order of addition rounds: the backend must give the reference's bits."""
    device = need(backend, OP)
    weight, grad, fisher = (whole_numbers((66, 210), d, i, device) for i, d in enumerate((*dtypes_of(backend), *DTYPES))
                            if i < 3)
    grad, fisher = None if order == "second" else grad, None if order == "first" else fisher
    for group_size in (1, 3, 66 if axis == 0 else 70):
        fine, signed = raw_taylor(backend, weight, grad, fisher, axis, order, group_size)
        want = reference.taylor_importance_fp64(weight, grad, fisher, axis, order, group_size)
        assert torch.equal(fine.double(), want[0])
        assert torch.equal(signed.double(), want[1])

"""Every backend against the float64 reference, and what the contract promises beyond closeness."""

from __future__ import annotations

import pytest
import torch

from hywia_kernels import BackendError, ops
from hywia_kernels.method.selection import top_units
from hywia_kernels.ops import BACKENDS, reference
from hywia_kernels.ops.checks import DTYPES, ORDERS
from tests.support.operands import (
    MIXES,
    NARROW,
    bits,
    cases,
    generator,
    guarded,
    lay,
    matrix,
    need,
    raw_taylor,
    run_examples,
    untouched,
    whole_numbers,
)
from tests.support.tolerances import TAYLOR, assert_sums, error, magnitude

OP = "taylor_importance"
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def of_order(order, weight, grad, fisher):
    return weight, None if order == "second" else grad, None if order == "first" else fisher


def operands(shape, order="mixed", seed=0, device="cpu", dtype=torch.float32):
    """Contiguous (weight, grad, fisher), as far as `order` reads them."""
    weight, grad, fisher = (matrix(shape, dtype, "contiguous", seed + i, device) for i in range(3))
    return of_order(order, weight, grad, fisher.abs())


def assert_right(backend, arguments):
    fine, signed = raw_taylor(backend, *arguments)
    want = reference.taylor_importance_fp64(*arguments)
    scale = magnitude(*arguments) if arguments[4] == "mixed" else want[0]
    assert_sums(fine, signed, want, scale, arguments[0].dtype)


def slow(backend, device):
    """The interpreter runs a program in about a millisecond: smaller shapes there."""
    return backend == "triton" and device == "cpu"


@every_backend
def test_random_matrices(backend):
    """Shapes, dtypes of each operand, layouts, axes, orders and group sizes, on outputs full of NaN."""
    device = need(backend, OP)

    def check(case):
        assert_right(backend, (*case.build(device), case.axis, case.order, case.group_size))

    run_examples(backend, cases(narrow=backend == "cuda"), check)


@every_backend
def test_every_mix_of_dtypes(backend):
    """All 27, on two layouts; the CUDA kernels refuse those that nobody has and say so."""
    device = need(backend, OP)
    for number, dtypes in enumerate(MIXES):
        for layout, axis in (("contiguous", 0), ("padded", 1)):
            weight, grad, fisher = (
                matrix((33, 70), dtype, layout, number + i, device) for i, dtype in enumerate(dtypes)
            )
            if backend == "cuda" and dtypes not in NARROW:
                with pytest.raises(BackendError, match="it takes torch"):
                    raw_taylor(backend, weight, grad, fisher, axis, "mixed", 1)
            else:
                assert_right(backend, (weight, grad, fisher, axis, "mixed", 1))


@every_backend
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("axis", [0, 1])
def test_whole_numbers_are_exact(backend, axis, order):
    """Sums that no order of addition rounds: every backend must give the same bits as the reference."""
    device = need(backend, OP)
    shape = (30, 90) if slow(backend, device) else (66, 1290)
    for dtype, layout in zip(DTYPES, ("contiguous", "transposed", "padded"), strict=True):
        made = (lay(whole_numbers(shape, dtype, i, device), layout) for i in range(3))
        weight, grad, fisher = of_order(order, *made)
        for group_size in (1, 3, shape[axis]):
            fine, signed = raw_taylor(backend, weight, grad, fisher, axis, order, group_size)
            want = reference.taylor_importance_fp64(weight, grad, fisher, axis, order, group_size)
            assert torch.equal(fine.double(), want[0])
            assert torch.equal(signed.double(), want[1])


@every_backend
@pytest.mark.parametrize(
    ("order", "fine", "signed"),
    [
        ("first", [10.0, 12.0], [-6.0, 0.0]),
        ("second", [9.0, 20.0], [9.0, 20.0]),
        ("mixed", [17.0, 28.0], [-15.0, -20.0]),
    ],
)
def test_worked_by_hand(backend, order, fine, signed):
    """grad·weight is [[2, -8], [-6, 6]]; ½·fisher·weight² is [[1, 8], [18, 2]]."""
    device = need(backend, OP)
    weight = torch.tensor([[1.0, -4.0], [3.0, 2.0]], device=device)
    grad = torch.tensor([[2.0, 2.0], [-2.0, 3.0]], device=device)
    fisher = torch.tensor([[2.0, 1.0], [4.0, 1.0]], device=device)
    got = ops.taylor_importance(weight, grad, fisher, axis=0, order=order, backend=backend)
    assert (got.fine.tolist(), got.signed.tolist()) == (fine, signed)
    columns = ops.taylor_importance(
        weight.t(), grad.t(), fisher.t(), axis=1, order=order, group_size=2, backend=backend
    )
    assert (columns.fine.tolist(), columns.signed.tolist()) == ([sum(fine)], [sum(signed)])


@every_backend
@pytest.mark.parametrize("axis", [0, 1])
def test_empty_matrices(backend, axis):
    """No units: empty results. Units of nothing: zeros, or what `out` held."""
    device = need(backend, OP)
    none = torch.empty((0, 5) if axis == 0 else (5, 0), device=device)
    assert ops.taylor_importance(none, none, axis=axis, group_size=3, backend=backend).fine.shape == (0,)
    hollow = torch.empty((4, 0) if axis == 0 else (0, 4), device=device)
    fine, signed = raw_taylor(backend, hollow, hollow, None, axis, "first", 2)
    assert (fine.tolist(), signed.tolist()) == ([0.0, 0.0], [0.0, 0.0])
    out = (torch.tensor([1.0, 2.0], device=device), torch.tensor([-3.0, 4.0], device=device))
    ops.taylor_importance(hollow, hollow, axis=axis, group_size=2, out=out, backend=backend)
    assert (out[0].tolist(), out[1].tolist()) == ([1.0, 2.0], [-3.0, 4.0])


@every_backend
@pytest.mark.parametrize("width", [40, 1100])
def test_coupled_matrices_add_up_in_out(backend, width):
    """A KV group's four matrices, of different axes and group sizes, into one result; and three of an MLP."""
    device = need(backend, OP)
    units = 6
    coupled = [((48, width), 0, 8), ((24, width), 0, 4), ((24, width), 0, 4), ((width, 48), 1, 8)]
    coupled += [((6, width), 0, 1), ((6, width), 0, 1), ((width, 6), 1, 1)]
    (fine, fine_whole), (signed, signed_whole) = (guarded(units, device, 0.0) for _ in range(2))
    want_fine, want_signed, scale = (torch.zeros(units, dtype=torch.float64, device=device) for _ in range(3))
    for number, (shape, axis, group_size) in enumerate(coupled):
        arguments = (*operands(shape, seed=10 * number, device=device), axis, "mixed", group_size)
        weight, grad, fisher = arguments[:3]
        result = ops.taylor_importance(
            weight, grad, fisher, axis=axis, order="mixed", group_size=group_size, out=(fine, signed), backend=backend
        )
        assert result.fine is fine
        assert result.signed is signed
        more = reference.taylor_importance_fp64(*arguments)
        want_fine += more[0]
        want_signed += more[1]
        scale += magnitude(*arguments)
        assert_sums(fine, signed, (want_fine, want_signed), scale, torch.float32)
    assert untouched(fine_whole)
    assert untouched(signed_whole)


@every_backend
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "stepped"])
def test_two_runs_give_the_same_bits(backend, axis, layout):
    device = need(backend, OP)
    shape = (130, 260) if slow(backend, device) else (1100, 1300)
    weight, grad, fisher = (matrix(shape, torch.float32, layout, i, device) for i in range(3))
    first, second = (raw_taylor(backend, weight, grad, fisher, axis, "mixed", 10) for _ in range(2))
    assert torch.equal(bits(first[0]), bits(second[0]))
    assert torch.equal(bits(first[1]), bits(second[1]))
    assert first[0].isfinite().all()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "stepped"])
def test_the_number_of_threads_does_not_change_the_bits(threads, axis, dtype, layout):
    need("native", OP)
    weight, grad, fisher = (matrix((1100, 1300), dtype, layout, i) for i in range(3))
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(raw_taylor("native", weight, grad, fisher, axis, "mixed", 4 if axis == 1 else 1))
    for other in results[1:]:
        assert torch.equal(bits(results[0][0]), bits(other[0]))
        assert torch.equal(bits(results[0][1]), bits(other[1]))


@every_backend
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("axis", [0, 1])
def test_units_of_half_a_million_weights(backend, axis, layout):
    """64 units of 512 rows (or columns) by 1024: bf16 weights with float32 gradients, as calibration has them."""
    device = need(backend, OP)
    units = 64 if backend in ("native", "cuda") or device == "cuda" else 2  # the reference is what they are held to
    shape = (units * 512, 1024) if axis == 0 else (1024, units * 512)
    weight = lay((torch.randn(shape, generator=generator(1)) * 0.02).bfloat16().to(device), layout)
    grad = lay((torch.randn(shape, generator=generator(2)) * 1e-4).to(device), layout)
    assert_right(backend, (weight, grad, None, axis, "first", 512))


@every_backend
def test_long_sums_of_one_sign_do_not_drift(backend):
    """Equal terms: rounding errors of one long chain of float32 additions would all point the same way."""
    device = need(backend, OP)
    for axis in (0, 1):
        length = 1 << 16 if slow(backend, device) else 1 << 20
        weight = torch.full((2, length) if axis == 0 else (length, 2), 0.1, device=device)
        want = reference.taylor_importance_fp64(weight, weight, None, axis, "first", 1)
        fine, signed = raw_taylor(backend, weight, weight, None, axis, "first", 1)
        assert_sums(fine, signed, want, want[0], torch.float32)
        assert torch.equal(bits(fine[:1]), bits(fine[1:]))


@every_backend
@pytest.mark.parametrize("axis", [0, 1])
def test_ranking(backend, axis):
    """The kept units are the reference's, unless the scores at the cut are closer than the error allows."""
    device = need(backend, OP)
    compared = 0
    for seed in range(4):
        shape = (120, 90) if axis == 0 else (90, 120)
        arguments = (*operands(shape, "second", 100 * seed, device), axis, "second", 2)
        fine, _ = raw_taylor(backend, *arguments)
        want = reference.taylor_importance_fp64(*arguments)[0]
        ordered = want.sort(descending=True).values
        for kept in range(1, 60):
            if ordered[kept - 1] - ordered[kept] > 2 * TAYLOR[torch.float32] * ordered[0]:
                assert torch.equal(top_units(fine, kept), top_units(want, kept))
                compared += 1
    assert compared > 200


@every_backend
@pytest.mark.parametrize("axis", [0, 1])
def test_ranking_of_equal_units(backend, axis):
    """Copies of a unit score the same bits wherever they lie, so that of equals the lower index stays."""
    device = need(backend, OP)
    weight, grad, _ = operands((5, 77), device=device)
    order = torch.tensor([3, 1, 3, 0, 2, 3, 1, 4, 0, 2, 3] * 7, device=device)
    weight, grad = weight[order], grad[order]
    if axis == 1:
        weight, grad = weight.t().contiguous(), grad.t().contiguous()
    fine, signed = raw_taylor(backend, weight, grad, None, axis, "first", 1)
    for unit in range(5):
        assert fine[order == unit].unique().numel() == 1
        assert signed[order == unit].unique().numel() == 1
    best = int(order[fine.argmax()])
    places = (order == best).nonzero()[:, 0]
    assert torch.equal(top_units(fine, 3).cpu(), places[:3].cpu())


@every_backend
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_their_unit_alone(backend, poison):
    """Calibration finds overflowed gradients by looking at the sums."""
    device = need(backend, OP)
    for axis in (0, 1):
        weight, grad, _ = operands((40, 40), device=device)
        grad[17, 23] = poison
        fine, signed = raw_taylor(backend, weight, grad, None, axis, "first", 4)
        bad = 17 // 4 if axis == 0 else 23 // 4
        assert not fine[bad].isfinite()
        assert not signed[bad].isfinite()
        others = torch.arange(10, device=device) != bad
        assert fine[others].isfinite().all()
        assert signed[others].isfinite().all()


@every_backend
def test_unread_operands_are_not_read(backend):
    device = need(backend, OP)
    weight, grad, fisher = operands((12, 20), device=device)
    nan = torch.full_like(weight, float("nan"))
    first = ops.taylor_importance(weight, grad, nan, axis=0, backend=backend)
    second = ops.taylor_importance(weight, nan, fisher, axis=0, order="second", backend=backend)
    assert torch.equal(first.fine, ops.taylor_importance(weight, grad, axis=0, backend=backend).fine)
    want = ops.taylor_importance(weight, None, fisher, axis=0, order="second", backend=backend)
    assert torch.equal(second.fine, want.fine)
    assert torch.equal(second.fine, second.signed)
    assert second.fine.isfinite().all()


@every_backend
def test_inputs_stay_as_they_were(backend):
    device = need(backend, OP)
    made = operands((34, 20), device=device)
    before = [x.clone() for x in made]
    ops.taylor_importance(*made, axis=1, order="mixed", group_size=5, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(made, before, strict=True))


@every_backend
def test_results_take_no_part_in_autograd(backend):
    """A parameter may be passed as it is; none of the ops is differentiable."""
    device = need(backend, OP)
    weight, grad, fisher = operands((8, 6), device=device)
    want = ops.taylor_importance(weight, grad, fisher, axis=0, order="mixed", backend=backend)
    parameter = torch.nn.Parameter(weight)
    got = ops.taylor_importance(parameter, grad, fisher, axis=0, order="mixed", backend=backend)
    assert torch.equal(got.fine, want.fine)
    assert not got.fine.requires_grad
    assert not got.signed.requires_grad
    out = (torch.zeros(8, device=device), torch.zeros(8, device=device))
    ops.taylor_importance(parameter, grad, fisher, axis=0, order="mixed", out=out, backend=backend)
    assert torch.equal(out[1], want.signed)
    assert not out[0].requires_grad


@every_backend
def test_sums_over_a_linear_layer_are_its_taps(backend):
    """Over an output row, Σ G·w = Σ_t y·dL/dy; over an input column, Σ G·w = Σ_t x·dL/dx."""
    device = need(backend, OP)
    torch.manual_seed(3)
    linear = torch.nn.Linear(24, 36, bias=False)
    x = torch.randn(50, 24, requires_grad=True)
    y = linear(x)
    y.retain_grad()
    (torch.nn.functional.silu(y) @ torch.randn(36, 5)).square().mean().backward()
    weight, grad = linear.weight.detach().to(device), linear.weight.grad.to(device)
    rows = ops.taylor_importance(weight, grad, axis=0, group_size=4, backend=backend)
    columns = ops.taylor_importance(weight, grad, axis=1, group_size=3, backend=backend)
    by_output = (y * y.grad).sum(0).detach().double().view(9, 4).sum(1).to(device)
    by_input = (x * x.grad).sum(0).detach().double().view(8, 3).sum(1).to(device)
    assert error(rows.signed, by_output, rows.fine.double()) <= 5e-6  # autograd's own float32 sums differ too
    assert error(columns.signed, by_input, columns.fine.double()) <= 5e-6
    assert by_output.abs().max() > 1e-3
    assert abs(float(rows.signed.double().sum() - columns.signed.double().sum())) <= 1e-5 * float(rows.fine.sum())


@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_beyond_two_to_the_31(axis):
    """Rows and columns 2^30 elements apart. Of the gigabytes behind them only the touched pages exist."""
    need("native", OP)
    far = 1 << 30
    storage = torch.empty(3 * far + 4096, dtype=torch.bfloat16)
    steps = (far, 1) if axis == 0 else (1, far)
    shape = (4, 40) if axis == 0 else (40, 4)
    weight, grad, fisher = (
        torch.as_strided(storage, shape, steps, start).copy_(matrix(shape, torch.bfloat16, "contiguous", start))
        for start in (0, 100, 200)
    )
    assert 3 * max(steps) > 1 << 31
    for along in (0, 1):
        assert_right("native", (weight, grad, fisher, along, "mixed", 2))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_start_beyond_two_to_the_31(axis):
    need("native", OP)
    storage = torch.empty((1 << 31) + (1 << 20), dtype=torch.bfloat16)
    tail = storage[-(1 << 12) :]
    assert tail.storage_offset() > 1 << 31
    weight, grad = tail[: 40 * 40].view(40, 40), tail[1600:3200].view(40, 40)
    weight.copy_(matrix((40, 40), torch.bfloat16, "contiguous", 1))
    grad.copy_(matrix((40, 40), torch.bfloat16, "contiguous", 2))
    assert_right("native", (weight, grad, None, axis, "first", 8))

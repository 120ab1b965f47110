"""Every backend against the float64 reference, the reference against autograd, and what else the contract promises."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st

from hywia_kernels import ops
from hywia_kernels.ops import BACKENDS, reference
from hywia_kernels.ops.calls import LinearCall
from hywia_kernels.ops.checks import DTYPES, LINEAR_ORDERS
from hywia_kernels.ops.registry import implementation
from tests.support.operands import (
    LAYOUTS,
    bits,
    divisors,
    guarded,
    matrix,
    need,
    run_examples,
    untouched,
    whole_numbers,
)
from tests.support.tolerances import error

OP = "linear_importance"
# Of a unit's magnitude: what its sums would be if every product of activations had the same sign. Products of 20 tokens
# and sums of them, all in float32, stay below 1e-6; losing one of a hundred terms is 1e-2.
TOLERANCE = 1e-5
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def slow(backend, device):
    return backend == "triton" and device == "cpu"


def fine_shape(order, units):
    return (3, units) if order == "all" else (units,)


def raw(backend, dy, x, w, offsets, axis, order="all", group_size=1, per_sample=True, scale=1.0):
    """The backend's own function, on outputs full of NaN inside guards."""
    run = implementation(OP, backend, dy, x, w)
    units, rows = w.shape[axis] // group_size, len(offsets) - 1 if per_sample else 1
    shape = fine_shape(order, units)
    made = [guarded(n, str(w.device)) for n in (units * (len(shape) > 1) * 2 + units, rows * units)]
    fine, coarse = made[0][0].view(shape), made[1][0].view(rows, units)
    run(LinearCall(dy, x, w, offsets, axis, order, group_size, per_sample, scale), fine, coarse, False)
    assert all(untouched(whole) for _, whole in made)
    return fine, coarse


def magnitudes(dy, x, w, offsets, axis, order, group_size, per_sample, scale):
    """The scale of rounding errors of fine and coarse: the same sums of absolute values throughout."""
    positive = (dy.double().abs(), x.double().abs(), w.double().abs())
    every, coarse = reference.linear_importance_fp64(*positive, offsets, axis, "all", group_size, True, scale)
    fine = {"first": every[0], "second": every[1], "mixed": every[0] + every[1]}
    fine["all"] = torch.stack([fine["first"], fine["second"], fine["mixed"]])
    return fine[order], coarse if per_sample else coarse.mean(0, keepdim=True)


def assert_right(got, *arguments):
    want = reference.linear_importance_fp64(*arguments)
    scales = magnitudes(*arguments)
    for name, out, ref, scale in zip(("fine", "coarse"), got, want, scales, strict=True):
        assert out.dtype == torch.float32
        worst = error(out, ref, scale)
        assert worst <= TOLERANCE, f"{name}: error {worst:.2e} over {TOLERANCE:.0e} of the unit's magnitude"


def operands(tokens, shape, dtype=torch.float32, device="cpu", seed=0):
    sizes = ((tokens, shape[0]), (tokens, shape[1]), shape)
    return tuple(matrix(size, dtype, "contiguous", seed + i, device) for i, size in enumerate(sizes))


def autograd_sums(dy, x, w, offsets, axis, group_size, scale):
    """Fine of the three orders and coarse from one backward per sample, the units summed one at a time."""
    gradients = []
    for begin, end in itertools.pairwise(offsets):
        weight = w.double().clone().requires_grad_()
        output = torch.nn.functional.linear(x[begin:end].double(), weight)
        (output * dy[begin:end].double()).sum().mul(scale).backward()
        gradients.append(weight.grad)
    mean = sum(gradients) / len(gradients)
    fisher = sum(g**2 for g in gradients) / len(gradients)
    weight = w.double()
    terms = (mean * weight, fisher * weight**2 / 2, mean * weight - fisher * weight**2 / 2)
    units = [
        slice(at, at + group_size) if axis == 0 else (slice(None), slice(at, at + group_size))
        for at in range(0, w.shape[axis], group_size)
    ]
    fine = torch.stack([torch.stack([t[u].abs().sum() for u in units]) for t in terms])
    return fine, torch.stack([torch.stack([(g * weight)[u].sum() for u in units]) for g in gradients])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("offsets", "scale"), [([0, 4, 8, 12], 1.0), ([0, 1, 9, 12], 0.125), ([0, 12], 3.0)])
def test_the_reference_is_what_autograd_gives(axis, offsets, scale):
    dy, x, w = operands(12, (6, 10))
    fine, coarse = autograd_sums(dy, x, w, offsets, axis, 2, scale)
    for number, order in enumerate(("first", "second", "mixed")):
        got = reference.linear_importance_fp64(dy, x, w, offsets, axis, order, 2, True, scale)
        torch.testing.assert_close(got[0], fine[number], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[1], coarse, rtol=1e-12, atol=1e-12)
    every = reference.linear_importance_fp64(dy, x, w, offsets, axis, "all", 2, True, scale)
    torch.testing.assert_close(every[0], fine, rtol=1e-12, atol=1e-12)
    mean = reference.linear_importance_fp64(dy, x, w, offsets, axis, "first", 2, False, scale)
    torch.testing.assert_close(mean[1], coarse.mean(0, keepdim=True), rtol=1e-12, atol=1e-12)


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    shape: tuple[int, int]
    axis: int
    order: str
    group_size: int
    per_sample: bool
    scale: float
    dtype: torch.dtype
    layouts: tuple[str, str, str]
    seed: int


@st.composite
def cases(draw) -> Case:
    length = st.integers(1, 20)
    even = draw(st.booleans())
    count = draw(st.integers(1, 6))
    lengths = (draw(length),) * count if even else tuple(draw(length) for _ in range(count))
    size = st.one_of(st.sampled_from((0, 1, 2, 16, 31, 32, 33, 64, 67)), st.integers(1, 70))
    shape, axis, order = (draw(size), draw(size)), draw(st.sampled_from((0, 1))), draw(st.sampled_from(LINEAR_ORDERS))
    layout = st.sampled_from(LAYOUTS)
    return Case(
        lengths=lengths,
        shape=shape,
        axis=axis,
        order=order,
        group_size=draw(st.sampled_from(divisors(shape[axis]))),
        per_sample=draw(st.booleans()) or order != "first",
        scale=draw(st.sampled_from((1.0, 2.0**-10, 3.0))),
        dtype=draw(st.sampled_from(DTYPES)),
        layouts=(draw(layout), draw(layout), draw(layout)),
        seed=draw(st.integers(0, 1 << 20)),
    )


@every_backend
def test_random_calls(backend):
    """Ragged and even samples, odd and empty shapes, layouts, dtypes, axes, orders, group sizes and scales."""
    device = need(backend, OP)

    def check(case):
        offsets = [0, *itertools.accumulate(case.lengths)]
        sizes = ((offsets[-1], case.shape[0]), (offsets[-1], case.shape[1]), case.shape)
        made = tuple(
            matrix(size, case.dtype, layout, case.seed + i, device)
            for i, (size, layout) in enumerate(zip(sizes, case.layouts, strict=True))
        )
        arguments = (*made, offsets, case.axis, case.order, case.group_size, case.per_sample, case.scale)
        assert_right(raw(backend, *arguments), *arguments)

    run_examples(backend, cases(), check)


@every_backend
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("order", LINEAR_ORDERS)
def test_every_order_and_dtype(backend, order, axis):
    device = need(backend, OP)
    for dtype in DTYPES:
        made = operands(24, (33, 20) if slow(backend, device) else (65, 130), dtype, device)
        for offsets in ([0, 8, 16, 24], [0, 3, 24]):
            arguments = (*made, offsets, axis, order, 1, True, 0.5)
            assert_right(raw(backend, *arguments), *arguments)


@every_backend
@pytest.mark.parametrize("axis", [0, 1])
def test_whole_numbers_are_exact(backend, axis):
    """Sums that no order of addition rounds, with a number of samples that is a power of two."""
    device = need(backend, OP)
    for dtype in DTYPES:
        made = tuple(whole_numbers(size, dtype, i, device) for i, size in enumerate(((8, 18), (8, 40), (18, 40))))
        arguments = (*made, [0, 2, 4, 6, 8], axis, "all", 2, True, 1.0)
        fine, coarse = raw(backend, *arguments)
        want = reference.linear_importance_fp64(*arguments)
        assert torch.equal(fine.double(), want[0])
        assert torch.equal(coarse.double(), want[1])
        assert want[0].min() > 0


@every_backend
def test_worked_by_hand(backend):
    """G_0 is [[1, 2], [-1, -2]], G_1 is [[6, 0], [3, 0]]: G is [[3.5, 1], [1, -1]], F [[18.5, 2], [5, 2]]."""
    device = need(backend, OP)
    dy = torch.tensor([[1.0, -1.0], [2.0, 1.0]], device=device)
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]], device=device)
    w = torch.tensor([[2.0, -1.0], [1.0, 4.0]], device=device)
    rows = ops.linear_importance(dy, x, w, samples=2, axis=0, order="all", backend=backend)
    assert rows.fine.tolist() == [[8.0, 5.0], [38.0, 18.5], [32.0, 21.5]]
    assert rows.coarse.tolist() == [[0.0, -9.0], [12.0, 3.0]]
    columns = ops.linear_importance(dy, x, w, samples=[0, 1, 2], axis=1, per_sample=False, scale=2.0, backend=backend)
    assert columns.fine.tolist() == [16.0, 10.0]
    assert columns.coarse.tolist() == [[16.0, -10.0]]


@every_backend
def test_orders_agree_with_all(backend):
    device = need(backend, OP)
    made = operands(12, (18, 34), device=device)
    every = raw(backend, *made, [0, 5, 12], 1)
    for number, order in enumerate(("first", "second", "mixed")):
        fine, coarse = raw(backend, *made, [0, 5, 12], 1, order)
        torch.testing.assert_close(fine, every[0][number], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(coarse, every[1], rtol=1e-5, atol=1e-4)


@every_backend
@pytest.mark.parametrize("samples", [3, [0, 4, 8, 12], torch.tensor([0, 4, 8, 12])])
def test_samples_by_number_list_or_tensor(backend, samples):
    device = need(backend, OP)
    made = operands(12, (16, 8), device=device)
    got = ops.linear_importance(*made, samples=samples, axis=0, order="mixed", backend=backend)
    want = raw(backend, *made, [0, 4, 8, 12], 0, "mixed")
    assert torch.equal(got.fine, want[0])
    assert torch.equal(got.coarse, want[1])
    assert got.coarse.shape == (3, 16)


@every_backend
@pytest.mark.parametrize("order", ["first", "all"])
def test_out_is_added_to(backend, order):
    """A KV group's output rows and another matrix's input columns, into one result."""
    device = need(backend, OP)
    first, second = operands(12, (24, 10), device=device), operands(12, (10, 24), device=device, seed=9)
    calls = ((first, 0), (second, 1))
    fine = torch.zeros(fine_shape(order, 6), device=device)
    coarse = torch.zeros(2, 6, device=device)
    for made, axis in calls:
        result = ops.linear_importance(
            *made, samples=2, axis=axis, order=order, group_size=4, out=(fine, coarse), backend=backend
        )
        assert result.fine is fine
        assert result.coarse is coarse
    each = [reference.linear_importance_fp64(*m, [0, 6, 12], axis, order, 4, True, 1.0) for m, axis in calls]
    scales = [magnitudes(*m, [0, 6, 12], axis, order, 4, True, 1.0) for m, axis in calls]
    for which, got in enumerate((fine, coarse)):
        assert error(got, each[0][which] + each[1][which], scales[0][which] + scales[1][which]) <= TOLERANCE


@every_backend
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("axis", [0, 1])
def test_nan_and_infinity_survive(backend, axis, poison):
    """In a sample's output gradient: its row of the weight gradient, and that sample's coarse sums, are not finite."""
    device = need(backend, OP)
    dy, x, w = operands(12, (20, 34), device=device)
    dy[7, 11] = poison
    fine, coarse = raw(backend, dy, x, w, [0, 4, 8, 12], axis, "all", 2)
    unit = 11 // 2 if axis == 0 else slice(None)
    assert not fine[:, unit].isfinite().any()
    assert not coarse[1, unit].isfinite().any()
    assert coarse[[0, 2]].isfinite().all()
    if axis == 0:
        others = torch.arange(10, device=device) != 5
        assert fine[:, others].isfinite().all()
        assert coarse[:, others].isfinite().all()


@every_backend
def test_no_rows_or_no_columns(backend):
    device = need(backend, OP)
    for shape in ((0, 5), (5, 0)):
        made = operands(8, shape, device=device)
        for axis in (0, 1):
            fine, coarse = raw(backend, *made, [0, 4, 8], axis)
            assert fine.tolist() == [[0.0] * shape[axis]] * 3
            assert coarse.tolist() == [[0.0] * shape[axis]] * 2


@every_backend
@pytest.mark.parametrize("axis", [0, 1])
def test_two_runs_give_the_same_bits(backend, axis):
    device = need(backend, OP)
    made = operands(24, (40, 50) if slow(backend, device) else (300, 700), device=device)
    first, second = (raw(backend, *made, [0, 10, 24], axis, "all", 10) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(bits(a), bits(b))
        assert a.isfinite().all()


@every_backend
@pytest.mark.parametrize("axis", [0, 1])
def test_what_the_weight_made_changes_nothing_but_rounding(backend, axis):
    """`mapped` spares work where a backend uses it; the result is what it is without."""
    device = need(backend, "linear_importance")
    dy, x, w = operands(12, (16, 24), device=device, seed=21)
    mapped = x @ w.t() if axis == 0 else dy @ w
    if backend == "cuda":
        dy, x, w, mapped = (t.half() for t in (dy, x, w, mapped))
    options = {"samples": [0, 5, 12], "axis": axis, "order": "all", "group_size": 4, "backend": backend}
    plain, got = ops.linear_importance(dy, x, w, **options), ops.linear_importance(dy, x, w, mapped=mapped, **options)
    torch.testing.assert_close(got.fine, plain.fine, rtol=1e-5, atol=0.0)
    scale = float(plain.coarse.abs().max())
    assert float((got.coarse - plain.coarse).abs().max()) <= (2e-3 if backend == "cuda" else 1e-6) * scale


@every_backend
def test_inputs_stay_and_nothing_is_differentiable(backend):
    device = need(backend, OP)
    made = operands(8, (6, 10), device=device)
    before = [t.clone() for t in made]
    want = ops.linear_importance(*made, samples=2, axis=0, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(made, before, strict=True))
    got = ops.linear_importance(*(t.requires_grad_() for t in made), samples=2, axis=0, backend=backend)
    assert torch.equal(got.fine, want.fine)
    assert not got.fine.requires_grad
    assert not got.coarse.requires_grad


@every_backend
def test_coarse_sums_are_the_taps_of_the_layer(backend):
    """Over an output row, Σ G_s·w = Σ_t y·dy of that sample; over an input column, Σ_t x·dx."""
    device = need(backend, OP)
    dy, x, w = operands(20, (36, 24), device=device)
    y, dx = x.double() @ w.double().t(), dy.double() @ w.double()
    for axis, taps in ((0, y * dy), (1, x * dx)):
        _, coarse = raw(backend, dy, x, w, [0, 10, 20], axis, "first")
        scale = magnitudes(dy, x, w, [0, 10, 20], axis, "first", 1, True, 1.0)[1]
        assert error(coarse, taps.view(2, 10, -1).sum(1), scale) <= TOLERANCE


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offsets", [[0, 60, 120, 180], [0, 1, 100, 180]])
def test_the_number_of_threads_does_not_change_the_bits(threads, axis, dtype, offsets):
    need("native", OP)
    made = operands(180, (700, 1300), dtype)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(raw("native", *made, offsets, axis, "all", 4))
    for other in results[1:]:
        assert torch.equal(bits(results[0][0]), bits(other[0]))
        assert torch.equal(bits(results[0][1]), bits(other[1]))


@pytest.mark.parametrize("axis", [0, 1])
def test_more_samples_than_a_chunk(axis):
    """Running sums between chunks, blocks in both directions, and a last chunk of one sample."""
    need("native", OP)
    for offsets in (list(range(0, 390, 3)), [0, *range(5, 135)]):
        made = operands(offsets[-1], (150, 1100), torch.bfloat16)
        arguments = (*made, offsets, axis, "all", 2, True, 1.0)
        assert len(offsets) - 1 > 128
        assert_right(raw("native", *arguments), *arguments)


@pytest.mark.parametrize("order", ["all", "first"])
@pytest.mark.parametrize("samples", [3, 130])
def test_both_axes_from_the_same_products(samples, order):
    """`also`, for one chunk of samples and for running sums between chunks, against a call for each."""
    need("native", OP)
    made, offsets = operands(2 * samples, (150, 1100), torch.bfloat16), list(range(0, 2 * samples + 1, 2))
    fines = [torch.full((3, n) if order == "all" else (n,), 2.0) for n in (75, 220)]
    coarses = [torch.full((samples, n), 2.0) for n in (75, 220)]
    run = implementation(OP, "native", *made)
    call = LinearCall(*made, offsets, 0, order, 2, True, 0.5)
    run(call, fines[0], coarses[0], False, also=(1, 5, fines[1], coarses[1]))
    for axis, size in ((0, 2), (1, 5)):
        fine, coarse = raw("native", *made, offsets, axis, order, size, True, 0.5)
        assert torch.equal(bits(fines[axis]), bits(fine))
        assert torch.equal(bits(coarses[axis]), bits(coarse))


def test_float32_products_stay_float32():
    """Whatever precision the caller allows elsewhere: bfloat16 products would be wrong by 1e-3."""
    need("native", OP)
    made = operands(64, (128, 96))
    arguments = (*made, [0, 32, 64], 0, "all", 1, True, 1.0)
    want = raw("native", *arguments)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        setting = torch.backends.mkldnn.matmul.fp32_precision
        got = raw("native", *arguments)
        assert torch.backends.mkldnn.matmul.fp32_precision == setting
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", torch.bfloat16):
        cast = raw("native", *arguments)
    for a, b, c in zip(want, got, cast, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_the_weight_gradients_are_never_whole(monkeypatch):
    """Blocks of gradients share one buffer of a few megabytes, however large the layer."""
    need("native", OP)
    sizes = []
    empty = torch.empty

    def record(*shape, **options):
        made = empty(*shape, **options)
        sizes.append(made.nbytes)
        return made

    made = operands(32, (1500, 2000))
    monkeypatch.setattr(torch, "empty", record)
    ops.linear_importance(*made, samples=4, axis=0, order="mixed", backend="native")
    assert 1 << 20 < max(sizes) <= 10 << 20
    assert 4 * 1500 * 2000 * 4 > 40 << 20

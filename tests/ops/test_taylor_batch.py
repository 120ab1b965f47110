"""`taylor_importance_batch`: every backend against the float64 reference, and its contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

from hywia_kernels import BackendError, UsageError, ops
from hywia_kernels.ops import BACKENDS, checks, reference
from hywia_kernels.ops.checks import ORDERS
from tests.support.batches import assert_right, attention, made, mlp, raw, scales
from tests.support.operands import (
    MIXES,
    NARROW,
    bits,
    lay,
    matrix,
    need,
    possible,
    run_examples,
    whole_numbers,
)
from tests.support.tolerances import TAYLOR, error

OP = "taylor_importance_batch"
every_backend = pytest.mark.parametrize("backend", BACKENDS)
COUPLED = [*attention(40, 8, 4, kv_heads=6, result=0), *mlp(32, 16, result=1), (7, 5, 1, 5, 2)]
# In whole words of 16 bytes.
WORDS = [
    *((48, 32, 0, 1, 0), (32, 48, 1, 1, 0), (32, 64, 0, 4, 1)),
    *((48, 16, 0, 1, 0), (16, 16, 1, 1, 2), (32, 128, 1, 64, 3)),
]


@st.composite
def batches(draw, narrow):
    """Matrices as (rows, columns, axis, group size, result), dtypes and layouts per operand, order and seed."""
    matrices, operands = [], []
    for result in range(draw(st.integers(1, 3))):
        units = draw(st.sampled_from((0, 1, 3, 8, 16, 33, 40)))
        for _ in range(draw(st.integers(1, 3))):
            group_size, reduce, axis = (draw(st.sampled_from(x)) for x in ((1, 1, 2, 5, 8), (0, 1, 8, 24, 37), (0, 1)))
            lines = units * group_size
            matrices.append((*((lines, reduce) if axis == 0 else (reduce, lines)), axis, group_size, result))
            layouts = [draw(st.sampled_from(("contiguous", "transposed", "padded", "one-row"))) for _ in range(3)]
            operands.append((draw(st.sampled_from(NARROW if narrow else MIXES)), layouts))
    return matrices, operands, draw(st.sampled_from(ORDERS)), draw(st.integers(0, 1 << 16))


@every_backend
def test_random_batches(backend):
    device = need(backend, OP)

    def check(batch):
        matrices, operands, order, seed = batch
        lists = [[], [], []]
        for i, (m, (dtypes, layouts)) in enumerate(zip(matrices, operands, strict=True)):
            for kind in range(3):
                layout = layouts[kind] if possible(layouts[kind], m[:2]) else "contiguous"
                lists[kind].append(matrix(m[:2], dtypes[kind], layout, seed + 3 * i + kind, device))
        call = checks.taylor_importance_batch(
            lists[0],
            None if order == "second" else lists[1],
            None if order == "first" else lists[2],
            [m[2] for m in matrices],
            order,
            [m[3] for m in matrices],
            [m[4] for m in matrices],
            None,
        )
        assert_right(backend, call)

    run_examples(backend, batches(backend == "cuda"), check)


@every_backend
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("matrices", [COUPLED, WORDS], ids=["coupled", "words"])
def test_whole_numbers_are_exact(backend, matrices, order):
    device = need(backend, OP)
    call = made(matrices, order, device)
    exact = call._replace(
        weights=[whole_numbers(w.shape, torch.bfloat16, i, device) for i, w in enumerate(call.weights)],
        grads=[whole_numbers(g.shape, torch.float32, 50 + i, device) for i, g in enumerate(call.grads)],
        fishers=[whole_numbers(f.shape, torch.float32, 90 + i, device) for i, f in enumerate(call.fishers)],
    )
    for got, want in zip(raw(backend, exact), reference.taylor_importance_batch_fp64(exact), strict=True):
        assert torch.equal(got[0].double(), want[0])
        assert torch.equal(got[1].double(), want[1])


@every_backend
def test_worked_by_hand(backend):
    """Rows of one matrix and columns of another into result 1; a third matrix, folded by two, is result 0."""
    device = need(backend, OP)
    ones = torch.ones(2, 2, device=device)
    a, b, c = (
        torch.tensor(x, device=device)
        for x in ([[1.0, -2.0], [3.0, 4.0]], [[5.0, 6.0], [-7.0, 8.0]], [[1.0, -9.0]] * 4)
    )
    weights, grads = [a, c, b], [ones, torch.ones(4, 2, device=device), ones]
    results = ops.taylor_importance_batch(
        weights, grads, axes=[0, 0, 1], group_sizes=[1, 2, 1], into=[1, 0, 1], backend=backend
    )
    assert [(r.fine.tolist(), r.signed.tolist()) for r in results] == [
        ([20.0, 20.0], [-16.0, -16.0]),
        ([3.0 + 12.0, 7.0 + 14.0], [-1.0 - 2.0, 7.0 + 14.0]),
    ]


@every_backend
@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_is_its_separate_calls(backend, order):
    device = need(backend, OP)
    call = made(COUPLED, order, device, (torch.bfloat16, torch.float32, torch.float32))
    expected = {}
    for i, result in enumerate(call.into):
        grad, fisher = (x[i] if x else None for x in (call.grads, call.fishers))
        expected[result] = ops.taylor_importance(
            call.weights[i],
            grad,
            fisher,
            axis=call.axes[i],
            order=order,
            group_size=call.group_sizes[i],
            out=expected.get(result),
            backend=backend,
        )
    results = assert_right(backend, call)
    for result, scale in enumerate(scales(call)):
        assert error(results[result][0], expected[result].fine.double(), scale) <= TAYLOR[torch.float32]
        assert error(results[result][1], expected[result].signed.double(), scale) <= TAYLOR[torch.float32]


@every_backend
def test_defaults_give_each_matrix_its_own_result(backend):
    device = need(backend, OP)
    weights = [matrix((8, 12), torch.float32, "contiguous", i, device) for i in range(3)]
    grads = [matrix((8, 12), torch.float32, "contiguous", 9 + i, device) for i in range(3)]
    results = ops.taylor_importance_batch(weights, grads, axes=1, group_sizes=4, backend=backend)
    assert len(results) == 3
    for weight, grad, result in zip(weights, grads, results, strict=True):
        fine, signed = reference.taylor_importance_fp64(weight, grad, None, 1, "first", 4)
        assert isinstance(result, ops.TaylorImportance)
        assert error(result.fine, fine, fine) <= TAYLOR[torch.float32]
        assert error(result.signed, signed, fine) <= TAYLOR[torch.float32]


@every_backend
def test_out_is_added_to_and_returned(backend):
    device = need(backend, OP)
    call = made(COUPLED, "mixed", device)
    plain = raw(backend, call)
    for (fine, signed), (first, second), scale in zip(raw(backend, call, 100.0), plain, scales(call), strict=True):
        assert error(fine, first.double() + 100.0, scale + 100.0) <= TAYLOR[torch.float32]
        assert error(signed, second.double() + 100.0, scale + 100.0) <= TAYLOR[torch.float32]
    out = [(f.clone(), s.clone()) for f, s in plain]
    options = {"axes": call.axes, "order": "mixed", "group_sizes": call.group_sizes, "into": call.into}
    results = ops.taylor_importance_batch(call.weights, call.grads, call.fishers, **options, out=out, backend=backend)
    for result, pair, (first, _), scale in zip(results, out, plain, scales(call), strict=True):
        assert result.fine is pair[0]
        assert result.signed is pair[1]
        assert error(result.fine, 2.0 * first.double(), scale) <= 2 * TAYLOR[torch.float32]


@every_backend
def test_empty_and_hollow_matrices(backend):
    device = need(backend, OP)
    none, hollow, full = torch.empty((0, 4)), torch.empty((3, 0)), torch.full((3, 2), 2.0)
    weights = [x.to(device) for x in (none, hollow, full, hollow)]
    results = ops.taylor_importance_batch(weights, weights, axes=0, into=[0, 1, 1, 2], backend=backend)
    assert [r.fine.tolist() for r in results] == [[], [8.0, 8.0, 8.0], [0.0, 0.0, 0.0]]


@every_backend
def test_two_runs_give_the_same_bits(backend):
    device = need(backend, OP)
    call = made(COUPLED, "mixed", device, (torch.bfloat16, torch.float32, torch.float32), "transposed")
    for first, second in zip(raw(backend, call), raw(backend, call), strict=True):
        assert torch.equal(bits(first[0]), bits(second[0]))
        assert torch.equal(bits(first[1]), bits(second[1]))


@every_backend
def test_nan_reaches_its_unit_alone(backend):
    device = need(backend, OP)
    call = made(COUPLED, "first", device)
    call.grads[3][5, 17] = float("nan")  # a column of unit 2 of result 0
    results = raw(backend, call)
    assert results[0][0].isnan().tolist() == [False, False, True, False, False, False]
    assert results[0][1].isnan().tolist() == [False, False, True, False, False, False]
    assert all(x.isfinite().all() for pair in results[1:] for x in pair)


def test_the_cuda_kernels_name_the_matrix_that_they_refuse():
    device = need("cuda", OP)
    weights = [matrix((8, 8), torch.bfloat16, "contiguous", i, device) for i in range(2)]
    grads = [weights[0], weights[1].half()]
    with pytest.raises(BackendError, match=r"matrix 1: grad: it takes torch\.bfloat16"):
        ops.taylor_importance_batch(weights, grads, axes=0, backend="cuda")
    assert ops.choose(OP, None, weights[0], grads[0], None, weights[1], grads[1], None) != "cuda"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "weights: expected a list or tuple of at least one matrix, got list of none"),
        ({"weights": torch.ones(2, 4, 6)}, "weights: expected a list or tuple of at least one matrix, got Tensor"),
        ({"grads": None}, "grads: expected tensors for order='first', got None; only 'second'"),
        ({"order": "mixed"}, "fishers: expected tensors for order='mixed', got None; only 'first'"),
        ({"order": "third"}, "order: expected one of first, second, mixed, got 'third'"),
        ({"grads": [torch.ones(4, 6)]}, "grads: expected one per matrix, 2, got 1"),
        ({"grads": [torch.ones(4, 6), torch.ones(4, 5)]}, r"matrix 1: grad: expected the weight's shape \[4, 6\]"),
        ({"axes": [0]}, "axes: expected one per matrix, 2, got 1"),
        ({"axes": 2}, r"matrix 0: axis: expected 0 \(units are rows\)"),
        ({"axes": "rows"}, "axes: expected a list or tuple of one per matrix, got str"),
        ({"group_sizes": [1, 3]}, "matrix 1: group_size: expected a positive divisor of the weight's size 4"),
        ({"into": [0, 2]}, r"into: expected indices of results within \[0, 2\), got 2"),
        ({"into": [1, 1]}, "into: expected every result up to the largest, 1, got none for 0"),
        ({"into": [0, 0], "axes": [0, 1]}, "into: expected matrices of equally many units in result 0, got 4 and, for"),
        ({"out": []}, r"out: expected a pair \(fine, signed\) per result, 2, got 0"),
        (
            {"out": [(torch.ones(4), torch.ones(4)), (torch.ones(4), torch.ones(5))]},
            r"result 1: out \(signed\): expected",
        ),
        (
            {"out": [(torch.ones(4),) * 2, (torch.ones(4), torch.ones(4))]},
            "out: expected a tensor of its own for every",
        ),
    ],
)
def test_wrong_arguments(change, message):
    call = {"weights": [torch.ones(4, 6)] * 2, "grads": [torch.ones(4, 6)] * 2, "axes": 0} | change
    with pytest.raises(UsageError, match=message):
        ops.taylor_importance_batch(call.pop("weights"), call.pop("grads"), **call)


def test_opcheck():
    call = made(COUPLED, "mixed", "cpu")
    units = [6, 16, 1]
    outputs = ([torch.zeros(n) for n in units], [torch.zeros(n) for n in units])
    for name, arguments in ((OP, (*call, None)), (f"{OP}_", (*call, *outputs, "reference"))):
        result = torch.library.opcheck(getattr(torch.ops.hywia, name).default, arguments)
        assert set(result.values()) == {"SUCCESS"}


def test_compiled_in_one_graph():
    call = made(COUPLED, "mixed", "cpu")
    options = {"axes": call.axes, "order": "mixed", "group_sizes": call.group_sizes, "into": call.into}

    def both(weights, grads, fishers):
        out = [(torch.ones(n), torch.zeros(n)) for n in (6, 16, 1)]
        first = ops.taylor_importance_batch(weights, grads, fishers, **options)
        second = ops.taylor_importance_batch(weights, grads, fishers, **options, out=out)
        return [2.0 * x for pair in (*first, *second) for x in pair]

    torch._dynamo.reset()
    want = both(call.weights, call.grads, call.fishers)
    got = torch.compile(both, fullgraph=True, backend="aot_eager")(call.weights, call.grads, call.fishers)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert error(want[-2], want[4].double() + 2.0, want[4].double() + 2.0) <= 1e-6


def test_a_layout_of_each_kind():
    """Views with steps in both directions: the kernels' general path."""
    need("native", OP)
    weights = [lay(matrix(m[:2], torch.float32, "contiguous", i), "stepped") for i, m in enumerate(COUPLED)]
    call = made(COUPLED, "first", "cpu")._replace(weights=weights)
    assert_right("native", call)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_native_gives_the_bits_of_the_matrices_one_by_one(threads):
    """Tasks of all matrices are shared out at once; every sum is still made in the order of its own matrix."""
    need("native", OP)
    shapes = [(576, 600, 0, 192, 0), (192, 576, 0, 64, 0), (1536, 576, 0, 1, 1), (576, 1536, 1, 1, 1), (0, 4, 0, 1, 2)]
    generator = torch.Generator().manual_seed(4)
    weights, grads = ([torch.randn(s[:2], generator=generator) for s in shapes] for _ in range(2))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = ops.taylor_importance_batch(
            weights,
            grads,
            axes=[s[2] for s in shapes],
            group_sizes=[s[3] for s in shapes],
            into=[s[4] for s in shapes],
            backend="native",
        )
    finally:
        torch.set_num_threads(before)
    want: dict[int, ops.TaylorImportance] = {}
    for weight, grad, (*_, axis, size, result) in zip(weights, grads, shapes, strict=True):
        want[result] = ops.taylor_importance(
            weight, grad, axis=axis, group_size=size, out=want.get(result), backend="native"
        )
    assert len(got) == 3
    for result, sums in enumerate(got):
        assert torch.equal(bits(sums.fine), bits(want[result].fine))
        assert torch.equal(bits(sums.signed), bits(want[result].signed))

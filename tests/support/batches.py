"""Calls of `taylor_importance_batch`, from matrices told as `(rows, columns, axis, group size, result)`."""

from __future__ import annotations

import torch

from hywia_kernels.ops import checks, reference
from hywia_kernels.ops.registry import implementation

from .operands import guarded, matrix, untouched
from .tolerances import TAYLOR, error, magnitude

Matrix = tuple[int, int, int, int, int]


def attention(hidden: int, query: int, key: int, kv_heads: int, result: int) -> list[Matrix]:
    """q, k, v and o of attention with `query` rows of q, and `key` of k and v, for each KV head."""
    rows = [(size * kv_heads, hidden, 0, size, result) for size in (query, key, key)]
    return [*rows, (hidden, query * kv_heads, 1, query, result)]


def mlp(hidden: int, width: int, result: int) -> list[Matrix]:
    """gate, up and down."""
    return [(width, hidden, 0, 1, result)] * 2 + [(hidden, width, 1, 1, result)]


def made(matrices, order, device, dtypes=(torch.float32,) * 3, layout="contiguous", seed=0):
    """The arguments that `checks.taylor_importance_batch` hands on."""
    operands = []
    for kind, dtype in enumerate(dtypes):
        operands.append([matrix(m[:2], dtype, layout, seed + 10 * i + kind, device) for i, m in enumerate(matrices)])
    weights, grads, fishers = operands
    return checks.taylor_importance_batch(
        weights,
        grads if order != "second" else None,
        [f.abs() for f in fishers] if order != "first" else None,
        [m[2] for m in matrices],
        order,
        [m[3] for m in matrices],
        [m[4] for m in matrices],
        None,
    )


def scales(call):
    """Of each result's rounding errors: the sum of its matrices' magnitudes."""
    totals = {}
    for i, result in enumerate(call.into):
        grad, fisher = (x[i] if x else None for x in (call.grads, call.fishers))
        more = magnitude(call.weights[i], grad, fisher, call.axes[i], call.order, call.group_sizes[i])
        totals[result] = totals[result] + more if result in totals else more
    return [totals[result] for result in range(len(totals))]


def raw(backend, call, start=None):
    """The backend's own function on guarded outputs: full of NaN, or added to where they hold `start`."""
    run = implementation("taylor_importance_batch", backend, *call.operands)
    units = [len(scale) for scale in scales(call)]
    device = str(call.weights[0].device)
    value = float("nan") if start is None else start
    fine, signed = ([guarded(n, device, value) for n in units] for _ in range(2))
    run(call, [inner for inner, _ in fine], [inner for inner, _ in signed], start is not None)
    assert all(untouched(whole) for _, whole in (*fine, *signed))
    return [(f, s) for (f, _), (s, _) in zip(fine, signed, strict=True)]


def assert_right(backend, call):
    results = raw(backend, call)
    wanted = reference.taylor_importance_batch_fp64(call)
    assert len(results) == len(wanted)
    for got, want, scale in zip(results, wanted, scales(call), strict=True):
        assert error(got[0], want[0], scale) <= TAYLOR[torch.float32]
        assert error(got[1], want[1], scale) <= TAYLOR[torch.float32]
    return results

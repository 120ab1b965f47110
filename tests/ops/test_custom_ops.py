"""The ops as `torch.library` custom ops, and inside torch.compile."""

from __future__ import annotations

import pytest
import torch

from hywia_kernels import ops
from tests.support.operands import generator

OPS = ("taylor_importance", "linear_importance", "compact", "attention_fusion")

# `opcheck` runs: the schema tells the truth about mutation and aliasing, autograd is registered soundly, the fake
# implementation agrees with the real one, also with dynamic shapes.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def random(*shape, dtype=torch.float32, seed=0, device="cpu"):
    return torch.randn(shape, generator=generator(seed)).to(device, dtype)


def backends(device):
    on = {a.name for a in ops.availability() if a.on}
    return [None, "reference"] + [b for b in ("native",) if device == "cpu" and b in on]


def samples(device):
    """Arguments of each op, by its name."""
    w, g, f = (random(12, 20, seed=i, device=device) for i in range(3))
    narrow = random(12, 20, dtype=torch.bfloat16, seed=5, device=device)
    keep = torch.tensor([0, 2, 3, 9])
    vector = random(12, device=device)
    fine, coarse = random(9, seed=6, device=device).exp(), random(9, seed=7, device=device).exp()

    def zeros(n):
        return torch.zeros(n, device=device)

    for backend in backends(device):
        yield "taylor_importance", (w, g, None, 0, "first", 1, backend)
        yield "taylor_importance", (w.t(), None, f.t(), 0, "second", 5, backend)
        yield "taylor_importance", (narrow, narrow, f, 1, "mixed", 4, backend)
        yield "taylor_importance_", (w, g, None, 0, "first", 3, zeros(4), zeros(4), backend)
        yield "taylor_importance_", (w, g, f, 1, "mixed", 1, zeros(20), zeros(20), backend)
        linear = (random(8, 12, seed=8, device=device), random(8, 20, seed=9, device=device), w)
        yield "linear_importance", (*linear, [0, 4, 8], 0, "all", 1, True, 1.0, None, backend)
        yield "linear_importance", (*linear, [0, 3, 8], 1, "first", 4, False, 0.5, None, backend)
        yield "linear_importance_", (*linear, [0, 8], 0, "mixed", 3, True, 1.0, None, zeros(4), zeros(4)[None], backend)
        yield (
            "linear_importance_",
            (*linear, [0, 2, 8], 1, "all", 2, True, 2.0, None, zeros(30).view(3, 10), zeros(20).view(2, 10), backend),
        )
        yield "compact", (w, keep, 0, backend)
        yield "compact", (narrow.t(), keep.to(device), 0, backend)
        yield "compact", (w, keep, 1, backend)
        yield "compact", (vector, keep, 0, backend)
        yield "compact_", (w, keep, 1, torch.zeros(12, 4, device=device), backend)
        yield "attention_fusion", (fine, coarse, 0.7, backend)
        yield "attention_fusion_", (fine, coarse, 1.5, zeros(9), zeros(9), backend)


def test_all_eight_ops_are_registered():
    names = {name for device in ["cpu"] for name, _ in samples(device)}
    assert names == {a + b for a in OPS for b in ("", "_")}
    for name in names:
        assert getattr(torch.ops.hywia, name).default._schema.name == f"hywia::{name}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", [name + suffix for name in OPS for suffix in ("", "_")])
def test_opcheck(op, device):
    checked = 0
    for name, arguments in samples(device):
        if name == op:
            result = torch.library.opcheck(getattr(torch.ops.hywia, op).default, arguments)
            assert set(result.values()) == {"SUCCESS"}
            assert len(result) == 4
            checked += 1
    assert checked >= 2


@pytest.mark.parametrize("device", DEVICES)
def test_the_custom_ops_do_what_the_functions_do(device):
    w, g = random(12, 20, seed=1, device=device), random(12, 20, seed=2, device=device)
    keep = torch.tensor([1, 4, 11])
    fine, signed = torch.ops.hywia.taylor_importance(w, g, None, 1, "first", 2, None)
    want = ops.taylor_importance(w, g, axis=1, group_size=2)
    assert torch.equal(fine, want.fine)
    assert torch.equal(signed, want.signed)
    assert torch.ops.hywia.taylor_importance_(w, g, None, 1, "first", 2, fine, signed, None) is None
    assert torch.equal(fine, 2 * want.fine)
    assert torch.equal(torch.ops.hywia.compact(w, keep, 0, None), w[keep.to(device)])
    out = torch.empty(3, 20, device=device)
    torch.ops.hywia.compact_(w, keep, 0, out, None)
    assert torch.equal(out, w[keep.to(device)])
    score, weight = torch.ops.hywia.attention_fusion(want.fine, want.signed.abs(), 1.0, None)
    fused = ops.attention_fusion(want.fine, want.signed.abs())
    assert torch.equal(score, fused.score)
    assert torch.equal(weight, fused.weight)


def taylor(w, g, f):
    result = ops.taylor_importance(w * 2.0, g, f, axis=1, order="mixed", group_size=5)
    return result.fine + 1.0, result.signed


def taylor_out(w, g, f):
    fine, signed = torch.ones(4, device=w.device), torch.zeros(4, device=w.device)
    for order in ("first", "second"):
        ops.taylor_importance(w, g, f, axis=0, order=order, group_size=3, out=(fine, signed))
    return fine.sqrt(), signed


def linear(w, g, f):
    result = ops.linear_importance(g.t(), w.t() * 2.0, f[:, :1] @ f[:1, :12], samples=4, axis=0, order="all")
    return result.fine + 1.0, result.coarse


def linear_out(w, g, f):
    pair = torch.ones(6, device=w.device), torch.zeros(1, 6, device=w.device)
    ops.linear_importance(g.t(), w.t(), f[:, :12], samples=[0, 7, 20], axis=1, group_size=2, per_sample=False, out=pair)
    return pair[0].sqrt(), pair[1]


def compact(w, g, f):
    keep = torch.tensor([0, 3, 8])
    return ops.compact(w, keep) + 1.0, ops.compact(g.t(), keep, 1), ops.compact(f[0], keep)


def compact_out(w, g, f):
    out = torch.zeros(12, 2, device=w.device)
    ops.compact(w, torch.tensor([5, 6]), 1, out=out)
    return out * g[:, :2], out


def fusion(w, g, f):
    fused = ops.attention_fusion(w.abs().sum(1), f.abs().sum(1), temperature=0.5)
    return fused.score * 2.0, fused.weight


def fusion_out(w, g, f):
    pair = torch.zeros(12, device=w.device), torch.zeros(12, device=w.device)
    score, weight = ops.attention_fusion(w.abs().sum(1), f.abs().sum(1), out=pair)
    return pair[0] + 1.0, weight, score


FUNCTIONS = [taylor, taylor_out, linear, linear_out, compact, compact_out, fusion, fusion_out]


def inputs(device, rows=12):
    return tuple(random(rows, 20, seed=i, device=device) for i in range(3))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_compiled_in_one_graph(function, device):
    """`fullgraph=True` refuses to fall back to Python anywhere."""
    made = inputs(device)
    want = function(*made)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(*made)
    assert len(got) == len(want)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_compiled_once_for_many_shapes():
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    def sums(w, g):
        result = ops.taylor_importance(w, g, axis=0, group_size=2)
        return result.fine - result.signed

    compiled = torch.compile(sums, fullgraph=True, dynamic=True, backend=count)
    for rows, columns in ((12, 20), (30, 8), (64, 33)):
        w, g = random(rows, columns, seed=1), random(rows, columns, seed=2)
        assert torch.equal(compiled(w, g), sums(w, g))
    assert len(graphs) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_by_inductor(device):
    """The default backend, all three ops in one graph."""

    def everything(w, g, f):
        signed = ops.taylor_importance(w, g, axis=0).signed
        fine, other = torch.zeros(12, device=w.device), torch.zeros(12, device=w.device)
        ops.taylor_importance(w, g, f, axis=0, order="mixed", out=(fine, other))
        fused = ops.attention_fusion(fine, signed.abs() + 1e-6)
        cut = ops.compact(w, torch.arange(0, 12, 3))
        return fused.score, fused.weight, other, cut * 2.0

    made = inputs(device)
    want = everything(*made)
    got = torch.compile(everything, fullgraph=True)(*made)
    for x, y in zip(got, want, strict=True):
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-6)
    assert torch.equal(got[3], want[3])


def test_a_wrong_argument_is_refused_while_compiling():
    w = random(12, 20)
    compiled = torch.compile(lambda w: ops.taylor_importance(w, w, axis=0, group_size=5).fine, backend="aot_eager")
    with pytest.raises(Exception, match="group_size: expected a positive divisor of the weight's size 12"):
        compiled(w)


def test_a_named_backend_inside_a_graph():
    w = random(12, 20)

    def run(w):
        return ops.taylor_importance(w, w, axis=0, backend="reference").fine

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(w), run(w))

"""The ops read memory: what has none here is refused, and what torch's dispatcher takes apart goes to it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hywia_kernels import UsageError, ops


class Elsewhere(torch.Tensor):
    """Values somewhere else, as a DTensor's: the address is zero."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, kinds, arguments=(), keywords=None):
        raise AssertionError(f"{function} was run on a tensor without values")


class Named(torch.Tensor):
    """A subclass with memory of its own, which may mean anything."""


CALLS = {
    "taylor_importance": lambda x, y: ops.taylor_importance(x, y, axis=0),
    "taylor_importance, grad": lambda x, y: ops.taylor_importance(y, x, axis=0),
    "taylor_importance, fisher": lambda x, y: ops.taylor_importance(y, None, x, axis=1, order="second"),
    "taylor_importance_both": lambda x, y: ops.taylor_importance_both(x, y),
    "taylor_importance_batch": lambda x, y: ops.taylor_importance_batch([y, x], [y, y], axes=0),
    "linear_importance": lambda x, y: ops.linear_importance(x, y, y, samples=2, axis=0),
    "linear_importance, input": lambda x, y: ops.linear_importance(y, x, y, samples=2, axis=0),
    "compact": lambda x, y: ops.compact(x, torch.tensor([0, 2]), 0),
    "attention_fusion": lambda x, y: ops.attention_fusion(x[0] if type(x) is torch.Tensor else x, y[0]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [Elsewhere, Named])
def test_subclasses_are_refused(call, kind):
    plain = torch.ones(4, 4)
    other = Elsewhere(plain) if kind is Elsewhere else plain.as_subclass(Named)
    with pytest.raises(
        UsageError, match=rf"expected a plain torch\.Tensor, got {kind.__name__} of .*; pass the values"
    ):
        CALLS[call](other, plain)


@pytest.mark.parametrize("call", CALLS)
def test_tensors_without_memory_are_refused(call):
    meta = torch.ones(4, 4, device="meta")
    keep = torch.tensor([0, 2])
    with pytest.raises(UsageError, match="got one without memory on meta; load it"):
        ops.compact(meta, keep, 0) if call == "compact" else CALLS[call](meta, meta)


def test_freed_memory_is_refused():
    weight = torch.ones(4, 4)
    weight.untyped_storage().resize_(0)
    with pytest.raises(UsageError, match="weight: expected a tensor with values, got one without memory on cpu"):
        ops.taylor_importance(weight, torch.ones(4, 4), axis=0)


def test_parameters_and_empty_tensors_are_taken():
    weight = torch.nn.Parameter(torch.full((2, 3), 2.0))
    assert ops.taylor_importance(weight, torch.ones(2, 3), axis=0).fine.tolist() == [6.0, 6.0]
    assert ops.compact(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), 0).shape == (0, 3)


def shapes(result):
    flat = [x for pair in result for x in (pair if isinstance(pair, tuple) else (pair,))]
    return [tuple(x.shape) for x in flat]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("call", [c for c in CALLS if c not in ("attention_fusion", "compact")])
def test_made_up_tensors_get_made_up_results(call, inside):
    plain = torch.ones(4, 4)
    want = shapes(CALLS[call](plain, plain))
    mode = FakeTensorMode()
    with mode:
        fake = torch.empty(4, 4)
        got = CALLS[call](fake, fake) if inside else None
    got = got if inside else CALLS[call](fake, fake)
    assert shapes(got) == want
    assert all(type(x).__name__ == "FakeTensor" for pair in got for x in (pair if isinstance(pair, tuple) else (pair,)))


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_calls_are_recorded(tracing):
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    graph = make_fx(lambda a, b: ops.taylor_importance(a, b, axis=0)[0], tracing_mode=tracing)(x, y)
    assert "torch.ops.hywia.taylor_importance" in graph.code
    assert torch.equal(graph(x, 2 * y), ops.taylor_importance(x, 2 * y, axis=0).fine)


def test_batched_calls_give_each_its_own():
    x = torch.randn(3, 4, 5)
    got = torch.vmap(lambda a: ops.taylor_importance(a, a, axis=0)[0])(x)
    assert torch.equal(got, torch.stack([ops.taylor_importance(a, a, axis=0).fine for a in x]))

"""The passes' own nodes of the graph: once differentiable, private gradients, and calls told apart by their layout."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hywia_kernels.engine import autograd, block, gated, kernels, linear, recompute, rotary
from hywia_kernels.engine.linear import Scorer, Target
from hywia_kernels.engine.results import Results
from hywia_kernels.engine.samples import padded
from hywia_kernels.ops import linear_importance
from hywia_kernels.progress import Bar
from hywia_kernels.types import Group, Member

ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if ON_CPU else "cuda"


def functions():
    kind = torch.autograd.Function
    modules = (autograd, block, gated, linear, recompute, rotary)
    own = [value for m in modules for value in vars(m).values() if isinstance(value, type) and issubclass(value, kind)]
    return [one for one in own if one.__module__.startswith("hywia_kernels.")]


def test_every_function_is_once_differentiable():
    names = {one.__name__ for one in functions()}
    assert {"_ScoredLinear", "_ScoredRows", "_Block", "_Gated", "_Applied", "_Rotary", "_Sources"} <= names
    for one in functions():
        assert one.backward.__code__ is once_differentiable(lambda ctx: None).__code__, one


def test_a_second_derivative_is_refused():
    x = torch.randn(5, requires_grad=True)
    y = recompute.apply(recompute.Rerun(lambda t: t**3), x)
    (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    torch.testing.assert_close(first.detach(), 6 * x.detach() ** 5)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="no CUDA device, no interpreter")
def test_a_gate_leaves_a_gradient_that_others_see():
    pytest.importorskip("triton")
    formula = kernels.gate_formula(nn.SiLU(), True)
    assert isinstance(formula, kernels.Gate)
    gate, up, dy = (torch.randn(3, 40, device=DEVICE) for _ in range(3))
    kept = dy.clone()
    shared = formula.backward(dy, gate, up)
    assert torch.equal(dy, kept)
    assert shared[1].data_ptr() != dy.data_ptr()
    private = formula.backward(dy, gate, up, private=True)
    assert private[1].data_ptr() == dy.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(shared, private, strict=True))


@pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="no CUDA device, no interpreter")
def test_a_gradient_that_a_hook_keeps_is_not_written_to():
    pytest.importorskip("triton")
    gate, up = (torch.randn(2, 40, device=DEVICE, requires_grad=True) for _ in range(2))
    seen = []
    y = recompute.apply(kernels.gate_formula(nn.SiLU(), True), gate, up)
    y.register_hook(seen.append)
    weight = torch.randn(40, device=DEVICE)
    (y * weight).sum().backward()
    assert torch.equal(seen[0], weight.expand(2, 40))
    torch.testing.assert_close(up.grad, nn.functional.silu(gate.detach()) * weight, rtol=1e-5, atol=1e-6)


def scorer_for(weight, samples):
    module = nn.Linear(*reversed(weight.shape), bias=False)
    module.weight = nn.Parameter(weight)
    group = Group(
        name="g",
        kind="mlp",
        layer=0,
        units=len(weight),
        unit="channel",
        members=(Member("m", 0, 1),),
        unit_parameters=1,
    )
    results = Results({"m": module}, [group], len(samples))
    return Scorer(results, samples, 1.0, None, Bar("", 1)), group, results


def test_operands_of_another_layout_are_chosen_for_again(monkeypatch):
    """Backends look at strides and alignment when they say what they take."""
    samples = padded(torch.zeros(2, 4, dtype=torch.long))
    weight = torch.randn(6, 5)
    scorer, group, results = scorer_for(weight, samples)
    asked = []
    original = linear.implementation
    monkeypatch.setattr(linear, "implementation", lambda *a: asked.append(1) or original(*a))
    grads, wide = torch.randn(8, 6), torch.randn(9, 10)
    operands = [wide[:8, :5].contiguous(), wide[:8, :5], wide[1:, 1:6], wide[:8, :5]]
    expected = torch.zeros(3, 6)
    with scorer.bar:
        for inputs in operands:
            target = Target(group.members[0], weight, results.fine["g"], results.coarse["g"][0])
            results._missing["g"] = 2
            scorer.score(target, grads, inputs)
            expected += linear_importance(grads, inputs, weight, samples=2, axis=0, order="all").fine
    assert len(asked) == 3
    torch.testing.assert_close(results.fine["g"], expected, rtol=1e-5, atol=1e-6)

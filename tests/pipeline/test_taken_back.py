"""A refit or a cut that fails at any step leaves the model as it was."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from state import assert_same, model_state
from test_passes import Interrupt

import hywia_kernels as hk
from hywia_kernels import HywiaError, ops
from hywia_kernels.method import compaction, equations, reconstruction, surgery
from tests.support.tiny import TINY, fresh, make_plan


@pytest.fixture
def text():
    return torch.randint(0, 256, (12, 11), generator=torch.Generator().manual_seed(3))


def values(model):
    return {n: v.clone() for n, v in model.state_dict().items()}


def assert_as_it_was(model, before):
    now = values(model)
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert now[name].dtype == value.dtype
        assert torch.equal(now[name], value), name


STEPS = [(step, at) for step in ("equations_of", "_solved", "_apply", "zero_units") for at in (1, 2, 4, 6)]
STEPS.append(("layer_target", 3))


@pytest.mark.parametrize(("step", "at"), STEPS)
def test_a_refit_that_fails(model, text, at, step, monkeypatch):
    plan = make_plan(model, "both")
    before, state = values(model), model_state(model)
    original, calls = getattr(reconstruction, step), []

    def planted(*arguments):
        calls.append(1)
        if len(calls) == at:
            raise HywiaError("planted")
        return original(*arguments)

    monkeypatch.setattr(reconstruction, step, planted)
    with pytest.raises(HywiaError, match="planted"):
        hk.reconstruct(model, plan, text)
    assert len(calls) == at
    assert_as_it_was(model, before)
    assert_same(state, model_state(model))
    monkeypatch.undo()
    assert hk.reconstruct(model, plan, text).fingerprint != plan.fingerprint  # and it can be tried again


def test_an_interrupted_refit(text):
    """At any line: all of it, or nothing."""
    made = fresh(TINY[2])
    plan = make_plan(made, "both")
    model = copy.deepcopy(made)
    with Interrupt() as whole:
        hk.reconstruct(model, plan, text)
    before, after = values(made), values(model)
    outcomes = set()
    for at in (*range(1, whole.lines, whole.lines // 40), *range(whole.lines - 130, whole.lines, 2)):
        model = copy.deepcopy(made)
        state = model_state(model)
        with Interrupt(at):
            hk.reconstruct(model, plan, text)
        now = values(model)
        outcomes.add(whole_of(now, before, after))
        assert_same(state, model_state(model))
    assert outcomes == {"before", "after"}


def whole_of(now, before, after):
    for name, one in (("before", before), ("after", after)):
        if all(torch.equal(now[n], one[n]) for n in one):
            return name
    return "half"


def test_a_solution_that_the_dtype_cannot_hold_is_refused(gqa, text, monkeypatch):
    plan = make_plan(gqa, "mlp")
    before = values(gqa)
    original = equations.NormalEquations.solve

    def huge(self, ridge):
        change, *errors = original(self, ridge)
        return change * float("inf"), *errors

    monkeypatch.setattr(equations.NormalEquations, "solve", huge)
    with pytest.raises(HywiaError, match=r"layers\.0\.mlp\.down_proj: its solution is beyond the range of float32"):
        hk.reconstruct(gqa, plan, text)
    assert_as_it_was(gqa, before)


@pytest.mark.parametrize("ridge", [float("nan"), float("inf"), -1.0, "4", True, None])
def test_a_ridge_that_is_no_positive_number(gqa, text, ridge):
    with pytest.raises(hk.UsageError, match="^ridge: expected a positive number, got"):
        hk.reconstruct(gqa, make_plan(gqa, "mlp"), text, ridge=ridge)


def test_an_interrupted_cut(gqa):
    made, plan = gqa, make_plan(gqa, "both")
    model = copy.deepcopy(made)
    with Interrupt() as whole:
        hk.prune(model, plan)
    before, after = values(made), values(model)
    outcomes = set()
    for at in range(1, whole.lines, max(1, whole.lines // 150)):
        model = copy.deepcopy(made)
        with Interrupt(at):
            hk.prune(model, plan)
        now = values(model)
        same = {n: v.shape for n, v in now.items()}
        whole_model = before if same == {n: v.shape for n, v in before.items()} else after
        outcomes.add(whole_of(now, before, after) if same == {n: v.shape for n, v in whole_model.items()} else "half")
    assert outcomes <= {"before", "after"}
    assert "before" in outcomes


def test_parameters_that_are_held_elsewhere_come_back_themselves(gqa, monkeypatch):
    """An optimiser's parameters, and gradients."""
    plan = make_plan(gqa, "both")
    held = gqa.model.layers[0].mlp.up_proj.weight
    for parameter in gqa.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    monkeypatch.setattr(surgery, "_follow", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hk.prune(gqa, plan)
    assert gqa.model.layers[0].mlp.up_proj.weight is held
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in gqa.parameters())


def test_what_is_cut_is_let_go_as_it_goes(gqa, monkeypatch):
    """The peak is the model and one parameter: no old parameter outlives its own cut."""
    plan = make_plan(gqa, "both")
    alive, most = [], []
    original = ops.compact

    def spy(weight, *arguments, **keywords):
        most.append(sum(one() is not None for one in alive))
        return original(weight, *arguments, **keywords)

    cut = {m.module for g in plan.groups if plan.keep[g.name].numel() < g.units for m in g.members}
    alive += [weakref.ref(gqa.get_submodule(name).weight) for name in sorted(cut)]
    monkeypatch.setattr(compaction.ops, "compact", spy)
    hk.prune(gqa, plan)
    assert most == list(range(len(alive), 0, -1))

"""A cut that fails at any step leaves a model of every family as it was: weights, widths, configs and hooks."""

from __future__ import annotations

import copy

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import ops
from hywia_kernels.method import compaction, reconstruction, surgery
from tests.support.families import FAMILIES, fresh, token_ids
from tests.support.unchanged import assert_as_it_was, hooks_and_forwards, numbers, values


def plan_for(model, kind="mlp", ratio=0.5):
    scores = hk.score(model, criterion="random", seed=1)
    units = {"both": ("mlp", "attention"), "all": ("mlp", "attention", "experts")}.get(kind, (kind,))
    return hk.plan(scores, group_ratio=ratio, units=units, align=1)


CUTS = [*((f.name, "both") for f in FAMILIES), ("mixtral", "experts"), ("mixtral", "all")]


@pytest.mark.parametrize(("name", "kind"), CUTS)
@pytest.mark.parametrize("at", ["first", "middle", "last", "follow"])
def test_a_cut_that_fails_is_taken_back(name, kind, at, monkeypatch):
    model = fresh(next(f for f in FAMILIES if f.name == name))
    text = token_ids()
    plan = plan_for(model, kind)
    before, said, flags = values(model), numbers(model), hooks_and_forwards(model)
    with torch.no_grad():
        logits = model(text).logits
    other = copy.deepcopy(model)
    calls, original = [], ops.compact
    monkeypatch.setattr(compaction.ops, "compact", lambda *a, **k: calls.append(1) or original(*a, **k))
    hk.prune(other, plan)
    failing = {"first": 1, "middle": len(calls) // 2, "last": len(calls), "follow": None}[at]
    del calls[:]
    if failing is None:
        follow = surgery._follow_config
        monkeypatch.setattr(surgery, "_follow_config", lambda *a: follow(*a) or 1 / 0)
    else:
        monkeypatch.setattr(
            compaction.ops,
            "compact",
            lambda *a, **k: calls.append(1) or (original(*a, **k) if len(calls) < failing else 1 / 0),
        )
    with pytest.raises(ZeroDivisionError):
        hk.prune(model, plan)
    assert_as_it_was(model, before, said, flags)
    with torch.no_grad():
        assert torch.equal(model(text).logits, logits)
    monkeypatch.undo()
    hk.prune(model, plan)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_refit_of_experts_that_fails_puts_the_router_back(monkeypatch):
    model = fresh(next(f for f in FAMILIES if f.name == "mixtral"))
    scores = hk.score(model, criterion="random", seed=1)
    plan = hk.plan(scores, group_ratio={"experts": 0.4, "attention": 0.5}, units=("experts", "attention"), align=1)
    before, said, flags = values(model), numbers(model), hooks_and_forwards(model)
    calls = []
    original = reconstruction.equations_of
    monkeypatch.setattr(
        reconstruction, "equations_of", lambda *a: calls.append(1) or (original(*a) if len(calls) < 2 else 1 / 0)
    )
    with pytest.raises(ZeroDivisionError):
        hk.reconstruct(model, plan, token_ids())
    assert_as_it_was(model, before, said, flags)

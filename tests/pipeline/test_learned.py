"""Learned masks: they go where the loss says, and touch nothing else."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError


@pytest.fixture
def text():
    return torch.randint(0, 256, (16, 17), generator=torch.Generator().manual_seed(3))


def divergence(dense, pruned, tokens):
    with torch.no_grad():
        want, got = (functional.log_softmax(m(tokens).logits.double(), -1) for m in (dense, pruned))
    return float(functional.kl_div(got, want, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("units", [("mlp",), ("attention",), ("mlp", "attention")])
def test_learned_masks_lose_less_than_where_they_began(gqa, text, units):
    scores = hk.score(gqa, criterion="random", seed=2)  # a start that leaves much to find
    plan = hk.plan(scores, group_ratio=0.4, units=units, align=4)
    learned = hk.learn_masks(gqa, scores, plan, text, steps=25, batch=8)
    again = hk.plan(learned, group_ratio=0.4, units=units, align=4)
    assert again.widths("mlp") == plan.widths("mlp")
    assert again.widths("attention") == plan.widths("attention")
    lost = []
    for chosen in (plan, again):
        masked = copy.deepcopy(gqa)
        hk.mask(masked, chosen)
        lost.append(divergence(gqa, masked, text))
    first, last = learned.record["learned"]["divergence"]
    assert first == pytest.approx(divergence_of_half(gqa, plan, text), rel=1e-3)
    assert lost[1] <= lost[0], "of three KV groups the start may have named the right two"
    if "mlp" in units:
        assert lost[1] < 0.9 * lost[0]
        assert last < first


def divergence_of_half(model, plan, text):
    masked = copy.deepcopy(model)
    hk.mask(masked, plan)
    return divergence(model, masked, text[:8])


def test_model_and_other_groups_stay_as_they_were(gqa, text):
    before = {k: v.clone() for k, v in gqa.state_dict().items()}
    scores = hk.fuse(hk.calibrate(gqa, text[:4]))
    plan = hk.plan(scores, group_ratio=0.4, layers=(1, 2), units=("mlp",), align=4)
    learned = hk.learn_masks(gqa, scores, plan, text, steps=2, batch=4)
    assert all(torch.equal(v, before[k]) for k, v in gqa.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in gqa.parameters())
    assert not any(m._forward_pre_hooks for m in gqa.modules())
    for group in scores.groups:
        same = torch.equal(learned.values[group.name], scores.values[group.name])
        assert same == (group.name != "model.layers.1.mlp"), group.name
    assert learned.record["fusion"] == "learned"
    repeated = hk.learn_masks(gqa, scores, plan, text, steps=2, batch=4)
    assert torch.equal(repeated.values["model.layers.1.mlp"], learned.values["model.layers.1.mlp"])


def test_bad_requests(gqa, text):
    scores = hk.score(gqa, criterion="random")
    plan = hk.plan(scores, group_ratio=0.4, align=4)
    with pytest.raises(UsageError, match="steps: expected steps and batch of at least 1, got 0 and 16"):
        hk.learn_masks(gqa, scores, plan, text, steps=0)
    with torch.no_grad():
        gqa.model.layers[0].mlp.down_proj.weight.mul_(2.0)
    with pytest.raises(HywiaError, match="made for another model"):
        hk.learn_masks(gqa, scores, plan, text)


def test_a_plan_that_removes_nothing(gqa, tokens):
    scores = hk.score(gqa, criterion="random")
    plan = hk.plan(scores, group_ratio=0.4, align=4)
    keep = {g.name: torch.arange(g.units) for g in plan.groups}
    plan = dataclasses.replace(plan, keep=keep, parameters_after=plan.parameters_before)
    with pytest.raises(UsageError, match="^plan: expected one that removes units, got one that keeps all"):
        hk.learn_masks(gqa, scores, plan, tokens, steps=1)

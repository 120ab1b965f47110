"""The loss of learned masks goes back part by part, with the gradients of the whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

import hywia_kernels as hk
from hywia_kernels import UsageError
from hywia_kernels.engine import loss
from hywia_kernels.method import mask_learning


def whole(model, dense, masked, counts):
    """As one expression, all logits at a time."""
    target = functional.log_softmax(loss.logits_of(model, dense), -1)
    got = functional.log_softmax(loss.logits_of(model, masked), -1)
    each = functional.kl_div(got, target, log_target=True, reduction="none").sum(-1)
    return (each * counts).sum() / counts.sum()


@pytest.mark.parametrize("tokens_at_once", [1, 7, 16, 1000])
def test_gradients_are_those_of_the_whole(gqa, tokens_at_once, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(3, 11, 48, generator=generator)
    root = torch.randn(3, 11, 48, generator=generator).requires_grad_()
    counts = (torch.arange(11) < torch.tensor([11, 4, 9])[:, None] - 1).float()
    for parameter in gqa.parameters():
        parameter.requires_grad_(False)
    masked = root.sin() * 2
    want = whole(gqa, dense, masked, counts)
    (expected,) = torch.autograd.grad(want, root, retain_graph=True)
    monkeypatch.setattr(loss, "LOGIT_BYTES", tokens_at_once * 4 * 259)
    seen, alive = [], []
    original = loss.logits_of

    def spy(model, states):
        seen.append(len(states))
        logits = original(model, states)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: alive.append(len(seen)))
        return logits

    monkeypatch.setattr(loss, "logits_of", spy)
    got = mask_learning._divergence(gqa, dense, root.sin() * 2, counts)
    assert float(got) == pytest.approx(float(want.detach()), rel=1e-5)
    assert not got.requires_grad
    torch.testing.assert_close(root.grad, expected, rtol=1e-5, atol=1e-8)
    parts = -(-33 // tokens_at_once)
    assert max(seen) == min(tokens_at_once, 33)
    assert alive == [2 * (part + 1) for part in range(parts)]  # each went back before the next was made


def test_a_plan_that_removes_nothing(gqa, tokens):
    scores = hk.score(gqa, criterion="random")
    plan = hk.plan(scores, group_ratio=0.4, align=4)
    keep = {g.name: torch.arange(g.units) for g in plan.groups}
    plan = dataclasses.replace(plan, keep=keep, parameters_after=plan.parameters_before)
    with pytest.raises(UsageError, match="^plan: expected one that removes units, got one that keeps all"):
        hk.learn_masks(gqa, scores, plan, tokens, steps=1)

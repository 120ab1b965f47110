"""Refitting: the regression it states, in the order it states, and the same model after the cut."""

from __future__ import annotations

import copy

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from tests.support.tiny import TINY, fresh, make_plan


@pytest.fixture
def text():
    return torch.randint(0, 256, (24, 19), generator=torch.Generator().manual_seed(3))


def hidden_error(dense, pruned, text):
    """Relative squared error of the last layer's output, tokens weighted by one over their mean square."""
    with torch.no_grad():
        want = dense.model(text).last_hidden_state.double()
        got = pruned.model(text).last_hidden_state.double()
    weight = 1 / want.square().mean(-1)
    return float(((want - got).square().mean(-1) * weight).mean())


def test_one_matrix_is_the_ridge_regression_that_is_stated(text):
    dense = fresh(TINY[2])
    scores = hk.score(dense, criterion="random", seed=2)
    plan = hk.plan(scores, group_ratio=0.5, layers=(1, 2), units=("mlp",), align=4)
    refitted = copy.deepcopy(dense)
    hk.reconstruct(refitted, plan, text, ridge=3.0)
    seen = {}
    layer, down = dense.model.layers[1], dense.model.layers[1].mlp.down_proj
    hooks = [
        down.register_forward_hook(lambda m, a, out: seen.update(x=a[0], y=out)),
        layer.register_forward_hook(lambda m, a, out: seen.update(out=out)),
    ]
    with torch.no_grad():
        dense.model(text)
    for hook in hooks:
        hook.remove()
    keep = plan.keep["model.layers.1.mlp"]
    x, y, out = (seen[k].flatten(0, 1).double() for k in ("x", "y", "out"))
    x, w = x[:, keep], 1 / out.square().mean(1)
    w = w / w.mean()
    before = down.weight.detach()[:, keep].double()
    gram = (x * w[:, None]).T @ x
    ridged = gram + 3.0 * 28 / text.numel() * gram.diagonal().mean() * torch.eye(len(keep), dtype=torch.float64)
    want = before + torch.linalg.solve(ridged, (x * w[:, None]).T @ (y - x @ before.T)).T
    got = refitted.model.layers[1].mlp.down_proj.weight.detach()
    assert torch.allclose(got[:, keep].double(), want, rtol=1e-4, atol=1e-6)
    gone = torch.ones(56, dtype=torch.bool)
    gone[keep] = False
    assert float(got[:, gone].abs().max()) == 0.0


@pytest.mark.parametrize("name", ["mlp", "attention", "both", "adaptive"])
def test_the_model_gets_nearer_to_the_dense_one(model, text, name):
    plan = make_plan(model, name)
    masked, refitted = copy.deepcopy(model), copy.deepcopy(model)
    hk.mask(masked, plan)
    after = hk.reconstruct(refitted, plan, text, ridge=1e-3)
    assert hidden_error(model, refitted, text) < 0.85 * hidden_error(model, masked, text)
    errors = after.record["refit"]["relative_error"]
    assert all(new < old for old, new in errors.values())
    cut = sum(plan.keep[g.name].numel() < g.units for g in plan.groups)
    assert len(errors) == cut


def test_refitted_then_cut_equals_refitted(model, text):
    plan = make_plan(model, "both")
    after = hk.reconstruct(model, plan, text)
    with torch.no_grad():
        want = model(text[:2]).logits
    hk.prune(model, after)
    with torch.no_grad():
        got = model(text[:2]).logits
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    assert after.keep == plan.keep or all(torch.equal(after.keep[k], plan.keep[k]) for k in plan.keep)


def test_padding_does_not_count(gqa, text, monkeypatch):
    """Ragged samples in runs of any size give the same matrices as each sample by itself."""
    plan = make_plan(gqa, "both")
    ragged = [row[: 6 + (i % 7) * 2] for i, row in enumerate(text)]
    one, two = copy.deepcopy(gqa), copy.deepcopy(gqa)
    hk.reconstruct(one, plan, ragged)
    monkeypatch.setattr("hywia_kernels.engine.samples.Samples.chunks", lambda samples, _: single(samples))
    hk.reconstruct(two, plan, ragged)
    for (name, a), b in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.allclose(a, b[1], rtol=1e-3, atol=1e-5), name


def single(samples):
    return [
        type(samples)(samples.tokens[i : i + 1, : int(n)], samples.lengths[i : i + 1], samples.index[i : i + 1])
        for i, n in enumerate(samples.lengths)
    ]


def test_a_large_ridge_leaves_the_survivors_as_they_were(gqa, text):
    plan = make_plan(gqa, "mlp")
    masked = copy.deepcopy(gqa)
    hk.mask(masked, plan)
    hk.reconstruct(gqa, plan, text, ridge=1e9)
    for layer, (a, b) in enumerate(zip(gqa.model.layers, masked.model.layers, strict=True)):
        assert torch.allclose(a.mlp.down_proj.weight, b.mlp.down_proj.weight, atol=1e-6), layer


def test_nothing_else_changes(gqa, text):
    plan = make_plan(gqa, "adaptive")
    before = {k: v.clone() for k, v in gqa.state_dict().items()}
    hk.reconstruct(gqa, plan, text)
    cut = [g for g in plan.groups if plan.keep[g.name].numel() < g.units]
    changed = {k for k, v in gqa.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{m.module}.weight" for g in cut for m in g.members}
    for group in cut:  # rows of survivors are as they were
        for member in group.members[:-1]:
            name = f"{member.module}.weight"
            rows = plan.keep[group.name][:, None] * member.group_size + torch.arange(member.group_size)
            assert torch.equal(gqa.state_dict()[name][rows.flatten()], before[name][rows.flatten()])
    assert all(p.requires_grad for p in gqa.parameters())


def test_bad_requests(gqa, text):
    plan = make_plan(gqa, "mlp")
    with pytest.raises(UsageError, match="ridge: expected a positive number, got 0"):
        hk.reconstruct(gqa, plan, text, ridge=0)
    with pytest.raises(HywiaError, match="vocabulary"):
        hk.reconstruct(gqa, plan, text + 1000)
    after = hk.reconstruct(gqa, plan, text)
    with pytest.raises(HywiaError, match="the weights differ"):
        hk.reconstruct(gqa, plan, text)
    hk.prune(gqa, after)

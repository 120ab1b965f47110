"""The leftover of a head is the error that the best refit without it leaves."""

from __future__ import annotations

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import UsageError
from hywia_kernels.method.head_residual import head_residuals, rank_heads


@pytest.fixture
def text():
    return torch.randint(0, 256, (20, 19), generator=torch.Generator().manual_seed(3))


def observed(model, group, text):
    """What enters the group's output matrix, with the ridge as observations, and the matrix; float64."""
    module = model.get_submodule(group.members[-1].module)
    seen = []
    hook = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model.get_decoder()(text)
    hook.remove()
    x = seen[0].flatten(0, 1).double()
    ridge = 0.01 * x.square().sum(0).mean()
    return torch.cat([x, ridge.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)]), module.weight.detach().double()


def error_without(x, weight, units, size):
    """Energy of what the best other columns leave of the output when the units' inputs go."""
    stays = torch.ones(x.shape[1], dtype=torch.bool)
    for unit in units:
        stays[unit * size : (unit + 1) * size] = False
    want = x @ weight.T
    return float((want - x[:, stays] @ torch.linalg.lstsq(x[:, stays], want).solution).square().sum())


def test_it_is_the_error_of_a_regression_without_the_head(model, text):
    found = head_residuals(model, text)
    assert set(found) == {g.name for g in hk.groups(model) if g.kind == "attention"}
    for group in (g for g in hk.groups(model) if g.kind == "attention"):
        x, weight = observed(model, group, text)
        for unit in range(group.units):
            error = error_without(x, weight, [unit], group.members[-1].group_size) / text.numel()
            assert float(found[group.name][unit]) == pytest.approx(error, rel=1e-4)


def test_shares_add_up_to_the_error_without_all_that_went_before(model, text):
    found = head_residuals(model, text)
    for group in (g for g in hk.groups(model) if g.kind == "attention"):
        x, weight = observed(model, group, text)
        size, shares = group.members[-1].group_size, found.shares[group.name].double()
        own = sum(
            float((x[:, u * size : (u + 1) * size] @ weight[:, u * size : (u + 1) * size].T).square().sum())
            for u in range(group.units)
        )
        order = found[group.name].argsort(stable=True).tolist()
        for count in range(1, group.units):
            together = error_without(x, weight, order[:count], size) / own
            assert float(shares[order[:count]].sum()) == pytest.approx(together, rel=1e-4)
        assert float(shares.sum()) == pytest.approx(float((x @ weight.T).square().sum()) / own, rel=1e-4)


def test_padding_does_not_count(gqa, text, monkeypatch):
    ragged = [row[: 6 + i % 9] for i, row in enumerate(text)]
    together = head_residuals(gqa, ragged)
    assert all(bool((v > 0).all()) for v in together.values())
    monkeypatch.setattr("hywia_kernels.engine.samples.Samples.chunks", lambda samples, _: one_by_one(samples))
    for name, want in head_residuals(gqa, ragged).items():
        assert torch.allclose(together[name], want, rtol=1e-4)


def one_by_one(samples):
    return [
        type(samples)(samples.tokens[i : i + 1, : int(n)], samples.lengths[i : i + 1], samples.index[i : i + 1])
        for i, n in enumerate(samples.lengths)
    ]


def test_heads_are_ranked_by_it_and_channels_as_before(gqa, text):
    scores = hk.fuse(hk.calibrate(gqa, text[:4]))
    measured = head_residuals(gqa, text)
    loss = {name: value.clone() for name, value in scores.loss.items()}
    chosen = rank_heads(scores, measured)
    plan = hk.plan(chosen, group_ratio={"mlp": 0.5, "attention": 0.34}, align=4)
    for group in plan.groups:
        if group.kind == "attention":
            assert sorted(plan.keep[group.name].tolist()) == sorted(measured[group.name].argsort()[1:].tolist())
        else:
            assert torch.equal(chosen.values[group.name], scores.values[group.name])
            assert torch.equal(chosen.loss[group.name], scores.loss[group.name])
    assert all(torch.equal(scores.loss[n], before) for n, before in loss.items())


def test_the_price_follows_the_rank(gqa, text):
    """Two heads that stand in for each other: one of them costs next to nothing, both together what both are worth."""
    layer = gqa.model.layers[0].self_attn
    with torch.no_grad():  # of three KV groups the second one is the first one again, twice as strong
        for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
            weight = getattr(layer, name).weight
            weight[rows : 2 * rows] = weight[:rows]
        layer.o_proj.weight[:, 16:32] = 2 * layer.o_proj.weight[:, :16]
    scores = hk.fuse(hk.calibrate(gqa, text[:4]))
    measured = head_residuals(gqa, text)
    ranked = rank_heads(scores, measured)
    name = "model.layers.0.attention"
    order = measured[name].argsort(stable=True).tolist()
    before, after = scores.loss[name].double(), ranked.loss[name].double()
    assert sorted(order[:2]) == [0, 1]
    whole = before.sum()
    assert float(after[order[0]]) < 0.05 * float(whole), "its twin takes it over"
    assert float(after[order[1]]) > 5 * float(after[order[0]]), "nobody is left to take it over"
    for other, share in measured.shares.items():
        assert torch.allclose(ranked.loss[other].double(), scores.loss[other].double().sum() * share.double())
    with pytest.raises(UsageError, match="measured: expected what head_residuals gives, got dict"):
        rank_heads(scores, dict(measured))


def test_scores_without_a_loss_estimate_get_none(gqa, text):
    ranked = rank_heads(hk.score(gqa, criterion="magnitude"), head_residuals(gqa, text))
    assert ranked.loss == {}

"""The leftover of a head is the error that the best refit without it leaves."""

from __future__ import annotations

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.method.head_residual import head_residuals, rank_heads


@pytest.fixture
def text():
    return torch.randint(0, 256, (20, 19), generator=torch.Generator().manual_seed(3))


def test_it_is_the_error_of_a_regression_without_the_head(model, text):
    found = head_residuals(model, text)
    assert set(found) == {g.name for g in hk.groups(model) if g.kind == "attention"}
    for group in (g for g in hk.groups(model) if g.kind == "attention"):
        module = model.get_submodule(group.members[-1].module)
        seen = []
        hook = module.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0]))
        with torch.no_grad():
            model.get_decoder()(text)
        hook.remove()
        x = seen[0].flatten(0, 1).double()
        ridge = 0.01 * x.square().sum(0).mean()
        x = torch.cat([x, ridge.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])  # the ridge as observations
        want = x @ module.weight.detach().double().T
        for unit in range(group.units):
            stays = torch.ones(x.shape[1], dtype=torch.bool)
            stays[unit * group.members[-1].group_size : (unit + 1) * group.members[-1].group_size] = False
            solved = torch.linalg.lstsq(x[:, stays], want).solution
            error = (want - x[:, stays] @ solved).square().sum() / text.numel()
            assert float(found[group.name][unit]) == pytest.approx(float(error), rel=1e-4)


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
    chosen = rank_heads(scores, measured)
    plan = hk.plan(chosen, group_ratio={"mlp": 0.5, "attention": 0.34}, align=4)
    for group in plan.groups:
        if group.kind == "attention":
            assert sorted(plan.keep[group.name].tolist()) == sorted(measured[group.name].argsort()[1:].tolist())
        else:
            assert torch.equal(chosen.values[group.name], scores.values[group.name])
    assert chosen.loss is scores.loss

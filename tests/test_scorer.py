"""The protocol: any tool that prunes rows or columns can be driven by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import hywia_kernels as hk
from hywia_kernels import UsageError
from tests.support.models import random_model, sizes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 6, 3)
        self.up = nn.ConvTranspose1d(6, 5, 2)
        self.head = nn.Linear(5, 3)

    def forward(self, ids):
        return self.head(self.up(self.conv(self.embed(ids).transpose(1, 2))).mean(2))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def other_dimensions(term, axis):
    return term.sum([d for d in range(term.dim()) if d != axis])


KEYS = [("embed", 1), ("conv", 0), ("conv", 1), ("up", 0), ("up", 1), ("head", 0), ("head", 1)]


@pytest.mark.parametrize("p", [1, 2, 3])
def test_magnitude(net, p):
    scores = hk.MagnitudeScorer(p)(net)
    assert list(scores) == KEYS
    for (name, axis), values in scores.items():
        want = other_dimensions(net.get_submodule(name).weight.detach().abs() ** p, axis)
        torch.testing.assert_close(values, want)


@pytest.mark.parametrize("grain", ["fine", "coarse"])
def test_taylor(net, grain):
    net(torch.arange(7)[None]).square().sum().backward()
    scores = hk.TaylorScorer(grain)(net)
    assert list(scores) == KEYS
    for (name, axis), values in scores.items():
        weight = net.get_submodule(name).weight
        term = weight.detach() * weight.grad
        want = other_dimensions(term.abs(), axis) if grain == "fine" else other_dimensions(term, axis).abs()
        torch.testing.assert_close(values, want)


def test_what_is_missing_is_named(net):
    with pytest.raises(UsageError, match=r"model: expected gradients in .grad, found none; run loss.backward\(\)"):
        hk.TaylorScorer()(net)
    with pytest.raises(UsageError, match="grain: expected fine or coarse, got 'sandy'"):
        hk.TaylorScorer("sandy")
    with pytest.raises(UsageError, match="fusion: expected one of"):
        hk.HyWIAScorer([], fusion="cold")
    with pytest.raises(UsageError, match="order: expected one of"):
        hk.HyWIAScorer([], order="last")
    with pytest.raises(AttributeError, match="has no attribute 'Scoring'"):
        hk.Scoring  # noqa: B018


def test_everything_with_a_call_from_model_to_scores_is_a_scorer(net):
    assert isinstance(hk.MagnitudeScorer(), hk.Scorer)
    assert isinstance(hk.TaylorScorer(), hk.Scorer)
    assert isinstance(hk.HyWIAScorer([]), hk.Scorer)
    assert not isinstance(3, hk.Scorer)


def test_ln_structured_keeps_what_the_scores_say(net):
    """PyTorch's own structured pruning, with the scores in place of a norm."""
    scores = hk.MagnitudeScorer()(net)
    for (name, axis), values in scores.items():
        module = net.get_submodule(name)
        shape = [1] * module.weight.dim()
        shape[axis] = -1
        importance = values.view(shape).expand_as(module.weight)
        prune.ln_structured(module, "weight", amount=2, n=1, dim=axis, importance_scores=importance)
        mask = module.weight_mask.movedim(axis, 0).flatten(1)
        gone = set((mask == 0).all(1).nonzero().flatten().tolist())
        assert gone == set(values.argsort()[:2].tolist())
        prune.remove(module, "weight")
        with torch.no_grad():
            module.weight.copy_(module.weight)


def test_hywia_gives_every_matrix_its_groups_scores():
    model = random_model(**sizes(64, 32, 40, layers=2, heads=4, kv_heads=2))
    ids = torch.randint(64, (3, 9))
    scores = hk.HyWIAScorer(ids)(model)
    own = hk.score(model, ids, fusion="attention")
    layer = "model.layers.1"
    assert list(scores)[:4] == [(f"model.layers.0.self_attn.{n}_proj", int(n == "o")) for n in "qkvo"]
    assert len(scores) == 2 * 7
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        assert torch.equal(scores[f"{layer}.mlp.{name}", axis], own.values[f"{layer}.mlp"])
    assert torch.equal(scores[f"{layer}.self_attn.q_proj", 0], own.values[f"{layer}.attention"])
    assert scores[f"{layer}.self_attn.o_proj", 1].shape == (2,)  # KV groups

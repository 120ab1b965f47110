"""Whole layers scored by what the model without them predicts, against a plain loop over models with layers skipped."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.checkpoint.scores_file import load_scores, save_scores
from hywia_kernels.method import layer_divergence
from tests.support.families import fresh_named, token_ids
from tests.support.models import random_model, sizes
from tests.support.unchanged import assert_as_it_was, hooks_and_forwards, numbers, values


def deep(layers=6, seed=0):
    model = random_model(seed=seed, **sizes(259, 32, 40, layers, 4, 2), initializer_range=0.2)
    with torch.no_grad():  # some layers say less than others
        for i, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.mul_((0.2, 1.0, 0.5, 0.1, 0.8, 0.3, 0.6)[i % 7])
            layer.self_attn.o_proj.weight.mul_((0.6, 0.3, 1.0, 0.2, 0.4, 0.1, 0.9)[i % 7])
    return model


def samples(count=3, length=11, seed=2):
    return torch.randint(0, 259, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def divergence(model, gone, rows) -> float:
    """Mean over all tokens of KL(dense | without `gone`), sample by sample, of a model built without the layers."""
    smaller = copy.deepcopy(model)
    smaller.model.layers = torch.nn.ModuleList([m for i, m in enumerate(smaller.model.layers) if i not in gone])
    smaller.config.num_hidden_layers = len(smaller.model.layers)
    total, tokens = 0.0, 0
    for row in rows:
        whole = functional.log_softmax(model(row[None], use_cache=False).logits.double(), -1)
        less = functional.log_softmax(smaller(row[None], use_cache=False).logits.double(), -1)
        total += float((whole.exp() * (whole - less)).sum())
        tokens += len(row)
    return total / tokens


def plain_order(model, rows, most):
    """Greedy: at each step every layer that is left is left out, and the one that is missed least goes."""
    depth, gone, totals = len(model.model.layers), [], []
    for _ in range(most):
        costs = {i: divergence(model, [*gone, i], rows) for i in range(depth) if i not in gone}
        gone.append(min(costs, key=lambda i: (costs[i], -i)))
        totals.append(costs[gone[-1]])
    return gone, totals


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_layers_go_in_the_order_of_a_plain_loop(seed):
    model, rows = deep(seed=seed), samples()
    before, said, flags = values(model), numbers(model), hooks_and_forwards(model)
    scores = hk.layer_divergences(model, rows, most=3)
    order, totals = plain_order(model, rows, 3)
    assert scores.record["order"] == order
    assert scores.record["divergence"] == pytest.approx(totals, rel=1e-4)
    assert scores.order[:3] == order
    assert scores.parameters == tuple(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    assert_as_it_was(model, before, said, flags)


def test_prices_are_of_the_unit_of_a_samples_mean_loss():
    """What each layer adds when those before it have gone, over the tokens of a sample; the last ones at the price they
    had when they were last asked."""
    model, rows = deep(), samples()
    scores = hk.layer_divergences(model, rows, most=2)
    totals = scores.record["divergence"]
    first, second = (float(scores.loss[i]) * 11 for i in scores.order[:2])
    assert (first, first + second) == pytest.approx(tuple(totals), rel=1e-5)
    alone = {i: divergence(model, [i], rows) for i in range(6)}
    for index in scores.order[2:]:
        assert float(scores.loss[index]) * 11 >= 0.999 * min(alone.values())
    assert scores.values.tolist() == [float(scores.order.index(i)) for i in range(6)]


def test_ragged_samples_count_their_own_tokens():
    model = deep()
    rows = [samples(seed=4)[0], samples(seed=5)[0, :4], samples(seed=6)[0, :7]]
    scores = hk.layer_divergences(model, rows, most=2)
    order, totals = plain_order(model, rows, 2)
    assert (scores.record["order"], scores.record["tokens"]) == (order, 22)
    assert scores.record["divergence"] == pytest.approx(totals, rel=1e-4)


def test_chunks_and_what_is_not_held_change_nothing(monkeypatch):
    model, rows = deep(), samples()
    want = hk.layer_divergences(model, rows, most=3)
    monkeypatch.setattr(layer_divergence, "CHUNK_TOKENS", 12)
    monkeypatch.setattr(layer_divergence, "HELD_BYTES", 0)
    monkeypatch.setattr(layer_divergence.loss, "LOGIT_BYTES", 4 * 259 * 5)
    got = hk.layer_divergences(model, rows, most=3)
    assert got.order == want.order
    assert got.record["divergence"] == pytest.approx(want.record["divergence"], rel=1e-4)


def test_only_layers_of_the_range_go_first():
    model, rows = deep(), samples()
    scores = hk.layer_divergences(model, rows, layers=(1, 4))
    assert sorted(scores.order[:3]) == [1, 2, 3]
    assert sorted(scores.record["order"]) == [1, 2, 3]
    plan = hk.plan(
        hk.rank_layers(hk.score(model, criterion="random"), scores), group_ratio={"layers": 0.7}, layers=(1, 4)
    )
    assert plan.depth.gone == tuple(sorted(scores.order[:2]))


@pytest.mark.parametrize("name", ["gemma3", "opt", "gpt2", "bloom", "qwen3_moe", "olmo2"])
def test_other_families_are_asked_whole(name):
    """What stands behind the last layer is the family's own: norms, projections, caps on logits."""
    model, tokens = fresh_named(name), token_ids()
    scores = hk.layer_divergences(model, tokens, most=1)
    skipped = copy.deepcopy(model)
    layer = skipped.get_submodule(hk.arch.architecture(skipped).layers)[scores.order[0]]
    layer.register_forward_hook(lambda m, a, out: (a[0], *out[1:]) if isinstance(out, tuple) else a[0])
    with torch.no_grad():
        whole, less = (functional.log_softmax(m(tokens).logits.double(), -1) for m in (model, skipped))
    want = float((whole.exp() * (whole - less)).sum(-1).mean())
    assert scores.record["divergence"][0] == pytest.approx(want, rel=1e-4)


def test_bad_requests_are_named():
    model = deep(2)
    with pytest.raises(UsageError, match=r"layers: expected \(first, end\) with 0 <= first < end <= 2, got \(1, 5\)"):
        hk.layer_divergences(model, samples(), layers=(1, 5))
    with pytest.raises(UsageError, match="most: expected at least one layer that may go, of 2, got 0"):
        hk.layer_divergences(model, samples(), most=0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(HywiaError, match="without layer 0 its predictions are NaN or Inf"):
        hk.layer_divergences(model, samples())


def test_scores_of_layers_are_kept_on_disk(tmp_path):
    model, rows = deep(), samples()
    scores = hk.rank_layers(hk.score(model, criterion="random"), hk.layer_divergences(model, rows, most=2))
    save_scores(tmp_path / "scores", scores)
    again, _ = load_scores(tmp_path / "scores")
    assert torch.equal(again.layers.values, scores.layers.values)
    assert torch.equal(again.layers.loss, scores.layers.loss)
    assert (again.layers.parameters, again.layers.record) == (scores.layers.parameters, scores.layers.record)
    save_scores(tmp_path / "random", hk.score(model, criterion="random", seed=4))
    random, _ = load_scores(tmp_path / "random")
    assert random.layers.loss is None
    assert torch.equal(random.layers.values, hk.score(model, criterion="random", seed=4).layers.values)

"""Whole layers scored by how much they turn the hidden states, and priced by what is predicted without them, against
plain loops over models with layers skipped."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError, arch
from hywia_kernels.checkpoint.scores_file import load_scores, save_scores
from hywia_kernels.method import layer_influence
from tests.support.families import fresh_named, token_ids
from tests.support.models import random_model, sizes
from tests.support.unchanged import assert_as_it_was, hooks_and_forwards, numbers, values


def deep(layers=6, seed=0):
    """A model some of whose layers say less than others."""
    model = random_model(seed=seed, **sizes(259, 32, 40, layers, 4, 2), initializer_range=0.2)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.mul_((0.2, 1.0, 0.5, 0.1, 0.8, 0.3, 0.6)[i % 7])
            layer.self_attn.o_proj.weight.mul_((0.6, 0.3, 1.0, 0.2, 0.4, 0.1, 0.9)[i % 7])
    return model


def samples(count=3, length=11, seed=2):
    return torch.randint(0, 259, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def influences(model, rows) -> list[float]:
    """1 - cos(in, out) of each layer, a mean over all tokens, sample by sample, by the hidden states that transformers
    returns: those that enter each layer, and for the last one what it gives."""
    layers = model.get_submodule(arch.architecture(model).layers)
    totals, tokens = [0.0] * len(layers), 0
    for row in rows:
        seen = {}
        for i, layer in enumerate(layers):
            layer.register_forward_hook(
                lambda m, a, out, i=i, seen=seen: seen.update({i: (a[0], out[0] if isinstance(out, tuple) else out)})
            )
        model(row[None], use_cache=False)
        for layer in layers:
            layer._forward_hooks.clear()
        for i, (entered, left) in seen.items():
            entered, left = entered.double()[0], left.double()[0]
            cosine = (entered * left).sum(-1) / (entered.norm(dim=-1) * left.norm(dim=-1))
            totals[i] += float((1 - cosine).sum())
        tokens += len(row)
    return [total / tokens for total in totals]


@torch.no_grad()
def divergence(model, gone, rows) -> float:
    """Mean over all tokens of KL(dense | without `gone`), sample by sample."""
    smaller = copy.deepcopy(model)
    for index in gone:
        layer = smaller.get_submodule(arch.architecture(smaller).layers)[index]
        layer.register_forward_hook(lambda m, a, out: (a[0], *out[1:]) if isinstance(out, tuple) else a[0])
    total, tokens = 0.0, 0
    for row in rows:
        whole, less = (
            functional.log_softmax(m(row[None], use_cache=False).logits.double(), -1) for m in (model, smaller)
        )
        total += float((whole.exp() * (whole - less)).sum())
        tokens += len(row)
    return total / tokens


def test_influences_and_prices_are_those_of_plain_loops():
    model, rows = deep(), samples()
    before, said, flags = values(model), numbers(model), hooks_and_forwards(model)
    scores = hk.layer_influence(model, rows, priced=3)
    assert_as_it_was(model, before, said, flags)
    want = influences(copy.deepcopy(model), rows)
    assert scores.values.tolist() == pytest.approx(want, rel=1e-4)
    assert scores.order == sorted(range(6), key=lambda i: want[i])
    totals = [divergence(model, scores.order[:n], rows) for n in (1, 2, 3)]
    assert scores.record["divergence"] == pytest.approx(totals, rel=1e-4)
    steps = [totals[0], totals[1] - totals[0], totals[2] - totals[1]]
    assert [float(scores.loss[i]) * 11 for i in scores.order] == pytest.approx([*steps, *[max(steps)] * 3], rel=1e-3)
    assert scores.parameters == tuple(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)


def test_without_competitors_nothing_is_priced(monkeypatch):
    monkeypatch.setattr(layer_influence, "leaving", lambda *a: pytest.fail("predictions were made"))
    scores = hk.layer_influence(deep(), samples())
    assert scores.loss is None
    assert scores.record["divergence"] == []


def test_ragged_samples_count_their_own_tokens():
    model = deep()
    rows = [samples(seed=4)[0], samples(seed=5)[0, :4], samples(seed=6)[0, :7]]
    scores = hk.layer_influence(model, rows, priced=2)
    assert scores.record["tokens"] == 22
    assert scores.values.tolist() == pytest.approx(influences(copy.deepcopy(model), rows), rel=1e-4)
    totals = [divergence(model, scores.order[:n], rows) for n in (1, 2)]
    assert scores.record["divergence"] == pytest.approx(totals, rel=1e-4)
    assert float(scores.loss[scores.order[0]]) == pytest.approx(totals[0] * 3 / 22, rel=1e-4)


def test_prices_are_of_the_first_samples_and_chunks_change_nothing(monkeypatch):
    model, rows = deep(), samples(5)
    monkeypatch.setattr(layer_influence, "PRICE_SAMPLES", 2)
    want = hk.layer_influence(model, rows, priced=2)
    assert want.record["divergence"][0] == pytest.approx(divergence(model, want.order[:1], rows[:2]), rel=1e-4)
    monkeypatch.setattr(layer_influence, "CHUNK_TOKENS", 12)
    monkeypatch.setattr(layer_influence.loss, "LOGIT_BYTES", 4 * 259 * 5)
    got = hk.layer_influence(model, rows, priced=2)
    assert got.values.tolist() == pytest.approx(want.values.tolist(), rel=1e-5)
    assert got.record["divergence"] == pytest.approx(want.record["divergence"], rel=1e-4)


def test_only_layers_of_the_range_go_and_are_priced():
    model, rows = deep(), samples()
    scores = hk.layer_influence(model, rows, priced=2, layers=(1, 4))
    inside = [i for i in scores.order if 1 <= i < 4]
    assert scores.record["divergence"][1] == pytest.approx(divergence(model, inside[:2], rows), rel=1e-4)
    ranked = hk.rank_layers(hk.score(model, criterion="random"), scores)
    plan = hk.plan(ranked, group_ratio={"layers": 0.7}, layers=(1, 4))
    assert plan.depth.gone == tuple(sorted(inside[:2]))
    assert plan.record["layers_by"] == "influence"


@pytest.mark.parametrize("name", ["gemma3", "opt", "opt-350m", "gpt2", "bloom", "qwen3_moe", "olmo2"])
def test_other_families_are_asked_whole(name):
    """What stands behind the last layer is the family's own: norms, projections, caps on logits."""
    model, tokens = fresh_named(name), token_ids()
    scores = hk.layer_influence(model, tokens, priced=1)
    assert scores.values.tolist() == pytest.approx(influences(copy.deepcopy(model), tokens), rel=1e-3)
    want = divergence(model, scores.order[:1], tokens)
    assert scores.record["divergence"][0] == pytest.approx(want, rel=1e-3)


def test_bad_requests_are_named():
    model = deep(2)
    with pytest.raises(UsageError, match=r"layers: expected \(first, end\) with 0 <= first < end <= 2, got \(1, 5\)"):
        hk.layer_influence(model, samples(), layers=(1, 5))
    with pytest.raises(UsageError, match="priced: expected 0 to 1 layers that may go, got 2"):
        hk.layer_influence(model, samples(), priced=2)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(HywiaError, match="layer 1 gives hidden states that are NaN or Inf"):
        hk.layer_influence(model, samples())


def test_scores_of_layers_are_kept_on_disk(tmp_path):
    model, rows = deep(), samples()
    scores = hk.rank_layers(hk.score(model, criterion="random"), hk.layer_influence(model, rows, priced=2))
    save_scores(tmp_path / "scores", scores)
    again, _ = load_scores(tmp_path / "scores")
    assert torch.equal(again.layers.values, scores.layers.values)
    assert torch.equal(again.layers.loss, scores.layers.loss)
    assert (again.layers.parameters, again.layers.record) == (scores.layers.parameters, scores.layers.record)
    save_scores(tmp_path / "random", hk.score(model, criterion="random", seed=4))
    random, _ = load_scores(tmp_path / "random")
    assert random.layers.loss is None
    assert torch.equal(random.layers.values, hk.score(model, criterion="random", seed=4).layers.values)

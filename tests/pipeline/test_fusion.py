"""Scores from statistics, and the criteria that need none."""

from __future__ import annotations

import math

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.method.scores import blend, coarse_estimate


@pytest.fixture
def statistics(gqa, tokens):
    return hk.calibrate(gqa, tokens)


def test_coarse_estimates_are_what_they_say():
    h = torch.tensor([[[1.0, -2.0], [3.0, 1.0]], [[0.5, 0.0], [-0.5, 2.0]]])  # [members 2, samples 2, units 2]
    first = torch.tensor([2.0 + 0.0, 0.5 + 1.0])
    second = torch.tensor([0.5 * 5.0 + 0.5 * 0.25, 0.5 * 2.5 + 0.5 * 2.0])
    mixed = torch.tensor([abs(2.0 - 2.5) + abs(0.0 - 0.125), abs(-0.5 - 1.25) + abs(1.0 - 1.0)])
    assert torch.allclose(coarse_estimate(h, "first"), first)
    assert torch.allclose(coarse_estimate(h, "second"), second)
    assert torch.allclose(coarse_estimate(h, "mixed"), mixed)


@pytest.mark.parametrize("order", ["first", "second", "mixed"])
def test_ablations_are_the_grains_themselves(statistics, order):
    fine, coarse = hk.fuse(statistics, "fine", order), hk.fuse(statistics, "coarse", order)
    for name in fine.values:
        assert torch.equal(fine.values[name], statistics.fine[name][order])
        assert torch.equal(coarse.values[name], coarse_estimate(statistics.coarse[name], order))


def test_coarse_never_exceeds_fine_of_the_same_terms(statistics):
    for name, samples in statistics.coarse.items():
        bound = statistics.fine[name]["first"]
        assert bool((coarse_estimate(samples, "first") <= bound * (1 + 1e-5)).all())


@pytest.mark.parametrize(("name", "share"), [("model.layers.2.mlp", 0.9), ("model.layers.2.attention", 0.05)])
def test_attention_is_the_op_with_a_prior_for_the_kind_of_unit(statistics, name, share):
    scores = hk.fuse(statistics, "attention")
    fine, coarse = statistics.fine[name]["second"], coarse_estimate(statistics.coarse[name], "second")
    zf, zc = ((x.double().log() - x.double().log().mean()) / x.double().log().std(correction=0) for x in (fine, coarse))
    query = (zf + zc) / 2
    logits = torch.stack([query * zf + math.log(share), query * zc + math.log(1 - share)])
    want = (torch.softmax(logits, 0) * torch.stack([zf, zc])).sum(0)
    assert torch.allclose(scores.values[name].double(), want, atol=1e-5)
    assert scores.record["fusion"] == "attention"


def test_an_even_prior_is_the_op_itself(statistics):
    name = "model.layers.2.mlp"
    fine, coarse = statistics.fine[name]["second"], coarse_estimate(statistics.coarse[name], "second")
    want = hk.ops.attention_fusion(fine, coarse, backend="reference").score
    assert torch.equal(blend(fine, coarse, "attention", "reference"), want)
    near = blend(fine, coarse, "attention", "reference", 0.5 + 1e-9)
    assert torch.allclose(near, want, atol=1e-6)


def test_mean_and_product_rank_between_the_grains(statistics):
    name = "model.layers.0.mlp"
    fine, coarse = statistics.fine[name]["second"], coarse_estimate(statistics.coarse[name], "second")
    product = hk.fuse(statistics, "product").values[name]
    assert torch.allclose(product.square(), fine * coarse, rtol=1e-5)
    mean = hk.fuse(statistics, "mean").values[name]
    zf = (fine.log() - fine.log().mean()) / fine.log().std(correction=0)
    zc = (coarse.log() - coarse.log().mean()) / coarse.log().std(correction=0)
    assert torch.allclose(mean, 0.5 * (zf + zc), atol=1e-4)


def test_magnitude_is_the_squared_norm_of_the_whole_unit(gqa):
    scores = hk.score(gqa, criterion="magnitude")
    mlp, attention = gqa.model.layers[1].mlp, gqa.model.layers[1].self_attn
    want = mlp.gate_proj.weight.square().sum(1) + mlp.up_proj.weight.square().sum(1)
    want = want + mlp.down_proj.weight.square().sum(0)
    assert torch.allclose(scores.values["model.layers.1.mlp"], want, rtol=1e-5)
    heads = attention.q_proj.weight.square().sum(1).view(3, 16).sum(1)
    heads = heads + attention.k_proj.weight.square().sum(1).view(3, 8).sum(1)
    heads = heads + attention.v_proj.weight.square().sum(1).view(3, 8).sum(1)
    heads = heads + attention.o_proj.weight.square().sum(0).view(3, 16).sum(1)
    assert torch.allclose(scores.values["model.layers.1.attention"], heads, rtol=1e-5)


def test_random_is_seeded(gqa):
    one, two = hk.score(gqa, criterion="random", seed=3), hk.score(gqa, criterion="random", seed=3)
    other = hk.score(gqa, criterion="random", seed=4)
    name = "model.layers.1.mlp"
    assert torch.equal(one.values[name], two.values[name])
    assert not torch.equal(one.values[name], other.values[name])


def test_scores_and_statistics_survive_the_disk(statistics, tmp_path):
    scores = hk.fuse(statistics)
    hk.save_scores(tmp_path / "s", scores, statistics)
    again, measured = hk.load_scores(tmp_path / "s")
    assert again.groups == scores.groups
    assert (again.parameters, again.fingerprint) == (scores.parameters, scores.fingerprint)
    assert again.record == scores.record
    for name, value in scores.values.items():
        assert torch.equal(again.values[name], value)
        assert torch.equal(again.loss[name], scores.loss[name])
        assert torch.equal(measured.coarse[name], statistics.coarse[name])
    refused = hk.fuse(measured, "coarse", "first")
    assert torch.equal(refused.values[name], hk.fuse(statistics, "coarse", "first").values[name])


def test_damaged_scores_are_refused(statistics, tmp_path):
    hk.save_scores(tmp_path / "s", hk.fuse(statistics))
    file = tmp_path / "s" / "scores.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(HywiaError, match="damaged"):
        hk.load_scores(tmp_path / "s")
    with pytest.raises(HywiaError, match="not a directory written by 'hywia score'"):
        hk.load_scores(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(criterion="taylor"), "criterion: expected one of hywia, magnitude, random, got 'taylor'"),
        (dict(fusion="sum"), "fusion: expected one of fine, attention, coarse, mean, product, got 'sum'"),
        (dict(order="third"), "order: expected one of first, second, mixed, got 'third'"),
        (dict(), "batches: expected token ids"),
        (dict(criterion="magnitude", backend="cudnn"), "backend: expected one of reference, native, triton, cuda"),
    ],
)
def test_bad_requests(gqa, tokens, call, message):
    batches = None if not call else tokens
    with pytest.raises(UsageError, match=message):
        hk.score(gqa, batches, **call)


def test_scores_that_are_no_numbers_are_refused(statistics):
    statistics.fine["model.layers.1.mlp"]["second"][5] = float("nan")
    with pytest.raises(HywiaError, match=r"model\.layers\.1\.mlp: expected finite scores"):
        hk.fuse(statistics)

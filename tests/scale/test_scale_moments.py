"""Statistics of what was asked for: one order, and moments in the place of the samples' own values."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import hywia_kernels as hk
from tests.support.families import fresh_named, token_ids

ORDERS = ("first", "second", "mixed")


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("way", [("fused", "fast"), ("fused", "lean"), ("autograd", "fast")], ids="-".join)
def test_one_order_is_as_among_all(name, way):
    model, how = fresh_named(name), {"engine": way[0], "memory": way[1]}
    whole = hk.calibrate(model, token_ids(), **how)
    assert whole.orders == ORDERS
    for order in ORDERS:
        alone = hk.calibrate(model, token_ids(), orders=(order,), **how)
        assert alone.orders == (order,)
        for group in whole.groups:
            assert list(alone.fine[group.name]) == [order]
            assert torch.equal(alone.fine[group.name][order], whole.fine[group.name][order])
            assert torch.equal(alone.coarse[group.name], whole.coarse[group.name])


def moments_of(statistics, orders=ORDERS):
    """The same statistics with moments in the place of the samples' own values."""
    moments = {}
    for name, coarse in statistics.coarse.items():
        moments[name] = torch.stack([coarse.double().mean(1), coarse.double().square().mean(1)])
    fine = {name: {order: of[order] for order in orders} for name, of in statistics.fine.items()}
    return dataclasses.replace(statistics, fine=fine, coarse={}, moments=moments, known_finite=False)


@pytest.fixture(scope="module")
def whole():
    return hk.calibrate(fresh_named("llama"), token_ids())


@pytest.mark.parametrize("order", ORDERS)
def test_moments_give_the_same_scores(whole, order):
    by_moments = hk.fuse(moments_of(whole), order=order)
    by_sample = hk.fuse(whole, order=order)
    for group in whole.groups:
        for one, other in (
            (by_moments.values[group.name], by_sample.values[group.name]),
            (by_moments.loss[group.name], by_sample.loss[group.name]),
        ):
            assert float((one - other).abs().max()) <= 2e-6 * float(other.abs().max())


def test_moments_are_written_and_read(whole, tmp_path):
    statistics = moments_of(whole, ("second",))
    scores = hk.fuse(statistics)
    hk.save_scores(tmp_path / "scores", scores, statistics)
    read_scores, read = hk.load_scores(tmp_path / "scores")
    assert read.orders == ("second",)
    assert read.coarse == {}
    for group in whole.groups:
        assert torch.equal(read.moments[group.name], statistics.moments[group.name])
        assert torch.equal(read_scores.values[group.name], scores.values[group.name])


def test_an_order_that_was_not_measured_is_refused(whole):
    with pytest.raises(
        hk.UsageError, match=r"order: expected one that was measured \(second\), got 'first'; score with"
    ):
        hk.fuse(moments_of(whole, ("second",)), order="first")


@pytest.mark.parametrize("orders", ["second", (), ("third",), ("second", "third")])
def test_unknown_orders_are_refused(orders):
    with pytest.raises(hk.UsageError, match="orders: expected some of first, second, mixed, got"):
        hk.calibrate(fresh_named("llama"), token_ids(), orders=orders)


def test_what_is_no_moments_is_refused(whole):
    good = moments_of(whole)
    name = whole.groups[0].name
    for moments, words in (
        ({**good.moments, name: good.moments[name].float()}, "expected moments float64"),
        ({**good.moments, name: good.moments[name] * float("nan")}, "expected finite statistics"),
        ({n: m for n, m in good.moments.items() if n != name}, "expected an entry of moments for every group"),
    ):
        with pytest.raises(hk.HywiaError, match=words):
            dataclasses.replace(good, moments=moments, known_finite=False)
    with pytest.raises(hk.HywiaError, match="expected coarse estimates by sample or their moments, got both"):
        dataclasses.replace(good, coarse=whole.coarse, known_finite=False)


def test_a_mean_over_samples_is_what_moments_are(whole):
    """Of the definition: the derivative of the mean loss is the mean of the samples' derivatives."""
    statistics = hk.calibrate_streamed(fresh_named("llama"), token_ids())
    for group in whole.groups:
        expected = whole.coarse[group.name].double().mean(1)
        got = statistics.moments[group.name][0]
        assert float((got - expected).abs().max()) < 3e-7 * float(expected.abs().max())

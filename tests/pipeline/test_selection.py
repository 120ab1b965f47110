"""Plans: the ratio met, reported exactly, by whole aligned units."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hywia_kernels as hk
from hywia_kernels import UsageError
from hywia_kernels.method.selection import top_units


@pytest.fixture
def scores(gqa):
    return hk.score(gqa, criterion="random", seed=1)


def test_ties_keep_the_lower_index():
    assert top_units(torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0]), 2).tolist() == [1, 2]
    assert top_units(torch.zeros(5), 3).tolist() == [0, 1, 2]
    assert top_units(torch.tensor([-1.0, -3.0, 2.0]), 2).tolist() == [0, 2]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(ratio=st.floats(0.01, 0.6), align=st.sampled_from([1, 4, 8, 16]), units=st.sampled_from(["mlp", "both"]))
def test_ratio_is_met_within_a_step_and_reported_exactly(gqa, scores, ratio, align, units):
    kinds = ("mlp",) if units == "mlp" else ("mlp", "attention")
    mlp = [g for g in scores.groups if g.kind == "mlp"]
    step = align * sum(g.unit_parameters for g in mlp) / scores.parameters
    if ratio > hk.plan(scores, group_ratio=0.99, units=kinds, align=align).ratio + step:
        with pytest.raises(UsageError, match="cannot be reached"):
            hk.plan(scores, ratio=ratio, units=kinds, align=align)
        return
    plan = hk.plan(scores, ratio=ratio, units=kinds, align=align)
    assert abs(plan.ratio - ratio) <= step
    widths = set(plan.widths("mlp"))
    assert len(widths) == 1
    assert all(w % align == 0 or w == 56 for w in widths)
    assert plan.layout == "uniform"
    pruned = copy.deepcopy(gqa)
    hk.prune(pruned, plan)
    assert sum(p.numel() for p in pruned.parameters()) == plan.parameters_after
    assert plan.ratio == 1 - plan.parameters_after / plan.parameters_before


def test_keeps_the_highest_scores(scores):
    plan = hk.plan(scores, ratio=0.2, align=8)
    for group in plan.groups:
        values, keep = scores.values[group.name], plan.keep[group.name]
        assert keep.tolist() == sorted(keep.tolist())
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[keep] = False
        if bool(gone.any()):
            assert float(values[keep].min()) >= float(values[gone].max())


def test_units_choose_what_may_go(scores):
    mlp_only = hk.plan(scores, ratio=0.2, units=("mlp",), align=8)
    assert set(mlp_only.widths("attention")) == {3}
    heads_only = hk.plan(scores, ratio=0.1, units=("attention",))
    assert set(heads_only.widths("mlp")) == {56}
    assert set(heads_only.widths("attention")) == {2}


def test_estimated_loss_decides_between_heads_and_channels(gqa, tokens):
    """With estimates that make attention free, heads go; that make channels free, channels go."""
    scores = hk.fuse(hk.calibrate(gqa, tokens))
    for cheap, heads in (("attention", True), ("mlp", False)):
        loss = {g.name: torch.full((g.units,), 1e-6 if g.kind == cheap else 1.0) for g in scores.groups}
        altered = hk.Scores(scores.groups, scores.values, loss, scores.parameters, scores.fingerprint)
        plan = hk.plan(altered, ratio=0.25, align=4)
        assert (plan.widths("attention")[0] < 3) == heads


def test_group_ratio_is_the_papers_protocol(scores):
    plan = hk.plan(scores, group_ratio=0.5, layers=(1, 3), units=("mlp",), align=4)
    assert plan.widths("mlp") == [56, 28, 28]
    assert plan.widths("attention") == [3, 3, 3]
    assert plan.layout == "adaptive"
    everywhere = hk.plan(scores, group_ratio=0.5, units=("mlp",), align=1)
    assert everywhere.widths("mlp") == [28, 28, 28]
    assert everywhere.layout == "uniform"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(ratio=0.0), "ratio: expected a number between 0 and 1"),
        (dict(ratio=1.0), "ratio: expected a number between 0 and 1"),
        (dict(ratio=float("nan")), "ratio: expected a number between 0 and 1"),
        (dict(ratio=0.99), "ratio: 0.99 cannot be reached to within one step"),
        (dict(group_ratio=-0.1), "group_ratio: expected a number between 0 and 1"),
        (dict(group_ratio=0.01), "group_ratio: 0.01 rounds to nothing"),
        (dict(), "exactly one of ratio and group_ratio"),
        (dict(ratio=0.2, group_ratio=0.2), "exactly one of ratio and group_ratio"),
        (dict(ratio=0.2, layers=(0, 1)), "layers: goes with group_ratio"),
        (dict(group_ratio=0.5, layers=(1, 9)), "layers: expected FIRST:END with 0 <= FIRST < END <= 3, got 1:9"),
        (
            dict(ratio=0.2, units=("mlp", "norm")),
            "units: expected some of mlp, attention, experts, layers, got mlp, norm",
        ),
        (dict(ratio=0.2, units=()), "units: expected some of mlp, attention, experts, layers, got none"),
        (dict(ratio=0.2, align=0), "align: expected at least 1, got 0"),
    ],
)
def test_bad_requests(scores, call, message):
    with pytest.raises(UsageError, match=message):
        hk.plan(scores, **call)


def test_widths_that_differ_already_need_group_ratio(gqa, scores):
    hk.prune(gqa, hk.plan(scores, group_ratio=0.5, layers=(1, 3), units=("mlp",), align=4))
    again = hk.score(gqa, criterion="random")
    with pytest.raises(hk.HywiaError, match="widths differ already"):
        hk.plan(again, ratio=0.1)
    assert hk.plan(again, group_ratio=0.5, units=("mlp",), align=4).widths("mlp") == [28, 16, 16]


def estimated(scores, seed=3, first_layer=1.0):
    """The same scores with loss estimates; the first layer's are multiplied."""
    generator = torch.Generator().manual_seed(seed)
    loss = {
        g.name: torch.rand(g.units, generator=generator) * (first_layer if g.layer == 0 else 1.0) for g in scores.groups
    }
    return hk.Scores(scores.groups, scores.values, loss, scores.parameters, scores.fingerprint)


def test_kinds_have_their_own_shares(scores):
    plan = hk.plan(scores, group_ratio={"mlp": 0.5, "attention": 0.34}, align=4)
    assert plan.widths("mlp") == [28, 28, 28]
    assert plan.widths("attention") == [2, 2, 2]
    only = hk.plan(scores, group_ratio={"attention": 0.34}, align=4)
    assert only.widths("mlp") == [56, 56, 56]
    assert only.record["group_ratio"] == {"attention": 0.34}


@pytest.mark.parametrize("call", [dict(ratio=0.2), dict(group_ratio=0.5), dict(group_ratio={"mlp": 0.5})])
def test_adaptive_removes_as_much_where_it_costs_less(scores, call):
    with_loss = estimated(scores, first_layer=1e3)
    uniform = hk.plan(with_loss, align=4, **call)
    adaptive = hk.plan(with_loss, align=4, layout="adaptive", **call)
    assert adaptive.parameters_after == uniform.parameters_after
    assert adaptive.widths("attention") == uniform.widths("attention")
    assert adaptive.widths("mlp")[0] > uniform.widths("mlp")[0], "the dear layer keeps more"
    assert all(w % 4 == 0 for w in adaptive.widths("mlp"))
    assert adaptive.layout == "adaptive"
    for plan in (uniform, adaptive):
        for group in plan.groups:
            values, keep = with_loss.values[group.name], plan.keep[group.name]
            gone = torch.ones(group.units, dtype=torch.bool)
            gone[keep] = False
            assert not bool(gone.any()) or float(values[keep].min()) >= float(values[gone].max())


def test_adaptive_spreads_evenly_where_layers_cost_the_same(scores):
    loss = {g.name: torch.arange(g.units).float() for g in scores.groups}
    values = {g.name: torch.arange(g.units).float() for g in scores.groups}
    alike = hk.Scores(scores.groups, values, loss, scores.parameters, scores.fingerprint)
    assert hk.plan(alike, group_ratio={"mlp": 0.5}, align=4, layout="adaptive").widths("mlp") == [28, 28, 28]


def test_adaptive_stays_within_the_listed_layers(scores):
    plan = hk.plan(estimated(scores), group_ratio=0.5, layers=(1, 3), units=("mlp",), align=4, layout="adaptive")
    assert plan.widths("mlp")[0] == 56
    assert sum(plan.widths("mlp")[1:]) == 56


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(ratio=0.2, layout="free"), "layout: expected one of uniform, adaptive, got 'free'"),
        (dict(ratio=0.2, align=4, layout="adaptive"), "layout: adaptive needs scores that estimate the loss"),
        (dict(group_ratio={"mlp": 1.5}), "group_ratio: expected a number between 0 and 1"),
        (dict(group_ratio={"norm": 0.5}), "units: expected some of mlp, attention"),
    ],
)
def test_bad_layouts(scores, call, message):
    with pytest.raises(UsageError, match=message):
        hk.plan(scores, **call)

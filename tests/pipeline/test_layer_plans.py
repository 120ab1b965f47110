"""How many layers a request takes, and which; with other kinds of units, and without."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.deploy import planning
from hywia_kernels.method.depth import most_gone
from tests.support.models import random_model, sizes


@pytest.fixture(scope="module")
def model():
    return random_model(**sizes(259, 48, 56, 6, 6, 3))


@pytest.fixture(scope="module")
def scores(model):
    return hk.score(model, criterion="random", seed=1)


def priced(scores, by_layer):
    """The scores with estimates of the loss: `by_layer` of whole layers, one a parameter of every other unit."""
    parameters = scores.layers.parameters
    layers = hk.LayerScores(parameters, torch.arange(float(len(parameters))), torch.tensor(by_layer))
    loss = {g.name: torch.full((g.units,), float(g.unit_parameters)) for g in scores.groups}
    return dataclasses.replace(scores, layers=layers, loss=loss)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.33, 0.5, 0.7])
def test_layers_alone_come_nearest_to_the_ratio(scores, model, ratio):
    plan = hk.plan(scores, ratio=ratio, units=("layers",))
    one = scores.layers.parameters[0] / scores.parameters
    assert set(scores.layers.parameters) == {scores.layers.parameters[0]}
    gone = len(plan.depth.gone)
    assert gone == max(1, min(range(6), key=lambda n: abs(n * one - ratio)))
    assert abs(plan.ratio - ratio) <= one
    assert plan.depth.gone == tuple(sorted(scores.layers.order[:gone]))
    lowest = sorted(range(6), key=lambda i: float(scores.layers.values[i]))[:gone]
    assert plan.depth.gone == tuple(sorted(lowest))
    assert plan.layout == "uniform"
    assert {len(plan.keep[g.name]) == g.units for g in plan.staying} == {True}
    assert {plan.keep[g.name].numel() for g in plan.groups if g.layer in plan.depth.gone} == {0}
    smaller = copy.deepcopy(model)
    hk.prune(smaller, plan)
    assert sum(p.numel() for p in smaller.parameters()) == plan.parameters_after


def test_of_equal_layers_the_lower_stays(scores):
    alike = hk.LayerScores(scores.layers.parameters, torch.zeros(6))
    plan = hk.plan(dataclasses.replace(scores, layers=alike), group_ratio={"layers": 0.34})
    assert plan.depth.keep == (0, 1, 2, 3)


def test_the_ratio_is_met_with_other_kinds_within_a_step_of_channels(scores):
    step = 4 * sum(g.unit_parameters for g in scores.groups if g.kind == "mlp") / scores.parameters
    seen = set()
    for ratio in (0.1, 0.25, 0.4):
        for gone in range(4):
            request = dict(ratio=ratio, units=("layers", "mlp", "attention"), align=4, layers_gone=gone)
            if gone * scores.layers.parameters[0] > (ratio + step) * scores.parameters:
                with pytest.raises(UsageError, match="cannot be reached to within one step"):
                    hk.plan(scores, **request)
                continue
            plan = hk.plan(scores, **request)
            seen.add(gone)
            assert abs(plan.ratio - ratio) <= step
            assert (0 if plan.depth is None else len(plan.depth.gone)) == gone
            widths = {w for w in plan.widths("mlp") if w}
            assert len(widths) == 1
            assert plan.layout == "uniform"
    assert seen == {0, 1, 2, 3}


def test_estimated_loss_decides_how_many_layers_go(scores):
    """Free layers all go before a channel does; dear ones stay, and channels go."""
    request = dict(ratio=0.3, units=("layers", "mlp", "attention"), align=4)
    free = hk.plan(priced(scores, [0.0] * 6), **request)
    most = int(0.3 * scores.parameters // scores.layers.parameters[0])
    assert len(free.depth.gone) in (most, most + 1)
    assert free.depth.gone == tuple(range(len(free.depth.gone)))
    dear = hk.plan(priced(scores, [1e9] * 6), **request)
    assert dear.depth is None
    # The first layer is free and the second dear: one goes, and channels make up the rest.
    mixed = hk.plan(priced(scores, [0.0, 1e9, 1e9, 1e9, 1e9, 1e9]), **request)
    assert mixed.depth.gone == (0,)
    assert {w for w in mixed.widths("mlp") if w} < {*range(56)}


def test_without_estimates_all_kinds_lose_alike(scores):
    plan = hk.plan(scores, ratio=0.5, units=("layers", "mlp", "attention"), align=4)
    shares = [len(plan.depth.gone) / 6, 1 - max(plan.widths("mlp")) / 56, 1 - max(plan.widths("attention")) / 3]
    assert max(shares) - min(shares) < 0.25


def test_shares_of_layers_and_of_units(scores):
    plan = hk.plan(scores, group_ratio={"layers": 0.3, "mlp": 0.5}, align=4)
    assert len(plan.depth.gone) == 2
    assert plan.widths("mlp") == [0 if i in plan.depth.gone else 28 for i in range(6)]
    assert set(plan.widths("attention")) == {0, 3}
    span = hk.plan(scores, group_ratio={"layers": 0.5}, layers=(2, 6))
    first = [i for i in scores.layers.order if i >= 2][:2]
    assert span.depth.gone == tuple(sorted(first))
    both = hk.plan(scores, group_ratio=0.34, units=("layers", "attention"))
    assert (len(both.depth.gone), max(both.widths("attention"))) == (2, 2)


def test_adaptive_widths_of_the_layers_that_stay(scores):
    with_loss = priced(scores, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    loss = {n: v * (1e3 if n.startswith("model.layers.3.") else 1.0) for n, v in with_loss.loss.items()}
    plan = hk.plan(
        dataclasses.replace(with_loss, loss=loss), group_ratio={"layers": 0.34, "mlp": 0.5}, align=4, layout="adaptive"
    )
    widths = plan.widths("mlp")
    assert widths[:2] == [0, 0]
    assert widths[3] == 56 > max(widths[2], *widths[4:])
    assert plan.layout == "adaptive"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            dict(ratio=0.99, units=("layers",)),
            r"ratio: 0.99 cannot be reached to within one step of .*; layers reach \[",
        ),
        (dict(group_ratio={"layers": 0.05}), "group_ratio: 0.05 rounds to nothing .* for layers"),
        (dict(ratio=0.2, layers_gone=1), "layers_gone: goes with layers among the units"),
        (dict(ratio=0.2, units=("layers",), layers_gone=6), "layers_gone: expected 0 to 5, got 6"),
        (dict(group_ratio={"layers": 0.4}, layers_gone=1), "layers_gone: goes with ratio"),
        (dict(ratio=0.2, units=("layer",)), "units: expected some of .*layers, got layer; did you mean layers?"),
    ],
)
def test_bad_requests(scores, call, message):
    with pytest.raises(UsageError, match=message):
        hk.plan(scores, **call)


def test_scores_without_layers_are_refused(model, scores):
    bare = dataclasses.replace(scores, layers=None)
    with pytest.raises(UsageError, match="scores: expected some of whole layers, got none"):
        hk.plan(bare, ratio=0.2, units=("layers",))
    plan = planning.check_reachable(model, bare, ratio=0.2, units=("layers",))
    assert len(plan.depth.gone) == len(hk.plan(scores, ratio=0.2, units=("layers",)).depth.gone)


@pytest.mark.parametrize(
    "request_",
    [
        dict(ratio=0.1),
        dict(ratio=0.5),
        dict(ratio=0.9),
        dict(group_ratio={"layers": 0.5}),
        dict(group_ratio={"layers": 0.5}, layers=(1, 4)),
        dict(group_ratio=0.4),
    ],
)
def test_as_many_layers_are_measured_as_a_request_can_take(scores, request_):
    most = most_gone(scores.layers.parameters, scores.parameters, **request_)
    assert 1 <= most <= 5
    for units in (("layers",), ("layers", "mlp")):
        given = {} if isinstance(request_.get("group_ratio"), dict) else {"units": units}
        try:
            plan = hk.plan(scores, align=4, **request_, **given)
        except UsageError:
            continue
        assert plan.depth is None or len(plan.depth.gone) <= most


def test_types_check_themselves(scores, model):
    parameters = scores.layers.parameters
    for wrong in ((), (0, 0), (1, 0), (6,), (0.0,)):
        with pytest.raises(HywiaError, match="layers: expected"):
            hk.Depth(parameters, wrong)
    for values in (torch.zeros(5), torch.full((6,), float("nan")), torch.zeros(6, dtype=torch.float64)):
        with pytest.raises(HywiaError, match="layers: expected"):
            hk.LayerScores(parameters, values)
    plan = hk.plan(scores, group_ratio={"layers": 0.34})
    with pytest.raises(HywiaError, match=r"keeps tensor.*but its layer \d goes"):
        dataclasses.replace(plan, keep={**plan.keep, **{g.name: torch.arange(g.units) for g in plan.groups}})
    with pytest.raises(HywiaError, match="parameters_after: expected"):
        dataclasses.replace(plan, parameters_after=plan.parameters_after + 1)
    with pytest.raises(HywiaError, match="expected the parameters of at least 6 layers"):
        dataclasses.replace(scores, layers=hk.LayerScores(parameters[:4], torch.zeros(4)))
    other = random_model(seed=9, **sizes(259, 48, 56, 6, 6, 3))
    with pytest.raises(HywiaError, match="made from the scores of another model"):
        hk.prune(other, plan)

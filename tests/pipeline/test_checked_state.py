"""Statistics, scores and plans check themselves when they are made."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.types import Group, Member, Plan, Scores, Statistics
from tests.support.tiny import make_plan

NAME = "model.layers.1.mlp"
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def scores(gqa, tokens):
    return hk.fuse(hk.calibrate(gqa, tokens))


@pytest.fixture
def statistics(gqa, tokens):
    return hk.calibrate(gqa, tokens)


@pytest.fixture
def plan(gqa):
    return make_plan(gqa, "both")


def without(mapping, name=NAME):
    return {k: v for k, v in mapping.items() if k != name}


def poisoned(mapping, value, name=NAME):
    tensor = mapping[name].clone()
    tensor.view(-1)[3] = value
    return {**mapping, name: tensor}


SCORES = {
    "no entry": (lambda s: dict(values=without(s.values)), NAME),
    "an entry beside": (lambda s: dict(values={**s.values, "other": torch.ones(2)}), "'other'"),
    "too few": (lambda s: dict(values={**s.values, NAME: s.values[NAME][:50]}), rf"{NAME}.*\[56\].*\[50\]"),
    "float64": (lambda s: dict(values={**s.values, NAME: s.values[NAME].double()}), rf"{NAME}.*float32.*float64"),
    "two dimensions": (lambda s: dict(values={**s.values, NAME: s.values[NAME][None]}), rf"{NAME}.*\[1, 56\]"),
    "a list": (lambda s: dict(values={**s.values, NAME: [1.0] * 56}), rf"{NAME}.*as a tensor"),
    "meta": (lambda s: dict(values={**s.values, NAME: s.values[NAME].to("meta")}), rf"{NAME}.*on meta"),
    "NaN": (lambda s: dict(values=poisoned(s.values, NAN)), f"{NAME}: expected finite scores"),
    "Inf": (lambda s: dict(values=poisoned(s.values, -INF)), f"{NAME}: expected finite scores"),
    "NaN in the loss": (lambda s: dict(loss=poisoned(s.loss, NAN)), f"{NAME}: expected finite loss estimates"),
    "loss of some": (lambda s: dict(loss=without(s.loss)), f"{NAME}: expected an entry of loss"),
    "loss that is none": (lambda s: dict(loss=None), "loss: expected a mapping"),
    "no groups": (lambda s: dict(groups=()), "groups: expected a tuple of at least one group"),
    "a list of groups": (lambda s: dict(groups=list(s.groups)), "groups: expected a tuple"),
    "a group twice": (
        lambda s: dict(groups=(*s.groups, s.groups[1])),
        r"expected each name once, got model\.layers\.0\.mlp twice",
    ),
    "no parameters": (lambda s: dict(parameters=0), "parameters: expected the number"),
    "parameters as a float": (lambda s: dict(parameters=float(s.parameters)), "parameters: expected the number"),
    "parameters as a bool": (lambda s: dict(parameters=True), "parameters: expected the number"),
    "fewer parameters than a group has": (lambda s: dict(parameters=7), "parameters together"),
    "no fingerprint": (lambda s: dict(fingerprint=None), "fingerprint: expected a string"),
    "a record that is none": (lambda s: dict(record=[1]), "record: expected a mapping"),
    "a record of tensors": (
        lambda s: dict(record={"a": {"b": [torch.ones(1)]}}),
        r"record\.a\.b\[0\]: expected what JSON",
    ),
    "a record with numbers as keys": (
        lambda s: dict(record={"a": {1: 2}}),
        r"record\.a: expected names as keys, got 1",
    ),
}


@pytest.mark.parametrize("case", SCORES)
def test_scores(scores, case):
    change, message = SCORES[case]
    with pytest.raises(HywiaError, match=message):
        dataclasses.replace(scores, **change(scores))


STATISTICS = {
    "no fine": (lambda s: dict(fine=without(s.fine)), f"{NAME}: expected an entry of fine"),
    "an order is missing": (
        lambda s: dict(fine={**s.fine, NAME: {"first": s.fine[NAME]["first"]}}),
        f"{NAME}: expected fine estimates of the orders first, second, mixed",
    ),
    "fine of another length": (
        lambda s: dict(fine={**s.fine, NAME: {k: v[1:] for k, v in s.fine[NAME].items()}}),
        rf"{NAME}: expected fine first float32 \[56\]",
    ),
    "coarse of other samples": (
        lambda s: dict(coarse={**s.coarse, NAME: s.coarse[NAME][:, 1:]}),
        rf"{NAME}: expected coarse float32 \[3, 4, 56\]",
    ),
    "coarse of other members": (
        lambda s: dict(coarse={**s.coarse, NAME: s.coarse[NAME][1:]}),
        rf"{NAME}.*\[2, 4, 56\]",
    ),
    "coarse of no samples": (
        lambda s: dict(coarse={k: v[:, :0] for k, v in s.coarse.items()}),
        "at least one sample, got none",
    ),
    "NaN": (lambda s: dict(coarse=poisoned(s.coarse, NAN)), f"{NAME}: expected finite statistics"),
}


@pytest.mark.parametrize("case", STATISTICS)
def test_statistics(statistics, case):
    change, message = STATISTICS[case]
    with pytest.raises(HywiaError, match=message):
        dataclasses.replace(statistics, **change(statistics))


def kept(*units):
    return lambda p: dict(keep={**p.keep, NAME: torch.tensor(units, dtype=torch.int64)})


PLANS = {
    "not ascending": (kept(3, 1, 2), rf"{NAME} keeps units \[3, 1, 2\]"),
    "one twice": (kept(1, 1, 2), f"{NAME} keeps units"),
    "beyond the last": (kept(1, 56), f"{NAME} keeps units.*of 0 to 55"),
    "negative": (kept(-1, 4), f"{NAME} keeps units"),
    "nothing": (kept(), f"{NAME} keeps nothing; every such group must keep at least one channel"),
    "int32": (lambda p: dict(keep={**p.keep, NAME: p.keep[NAME].int()}), rf"{NAME}.*int64.*int32"),
    "a list": (lambda p: dict(keep={**p.keep, NAME: [1, 2]}), f"{NAME}: expected kept units as a tensor"),
    "no entry": (lambda p: dict(keep=without(p.keep)), f"{NAME}: expected an entry of keep"),
    "an entry beside": (lambda p: dict(keep={**p.keep, "x": torch.arange(2)}), "'x'"),
    "parameters of another cut": (
        kept(1, 2, 3),
        r"parameters_after: expected [\d,]+, which is what the kept units leave",
    ),
    "none are left": (lambda p: dict(parameters_after=0), "parameters_after: expected the number"),
    "a layout of its own": (lambda p: dict(layout="free"), "layout: expected one of uniform, adaptive"),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans(plan, case):
    change, message = PLANS[case]
    with pytest.raises(HywiaError, match=message):
        dataclasses.replace(plan, **change(plan))


GROUPS = {
    "name": ["", None, 3],
    "kind": ["norm", "", None, ["mlp"]],
    "layer": [-1, "0", 1.0],
    "units": [0, -3, "56", 56.0, True],
    "unit": [None, 4],
    "members": [(), [Member("m", 0, 1)], ("m",)],
    "vectors": [[], ("v",)],
    "unit_parameters": [-1, 1.5, None],
    "stock_counts": [[1], (0,), ("2",)],
    "min_units": [0, 57, None],
    "tied_width": [None, 3],
    "width_field": [None],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in GROUPS.items() for v in values])
def test_groups(scores, field, value):
    group = next(g for g in scores.groups if g.name == NAME)
    with pytest.raises(HywiaError, match=rf"group .*: expected .*, got {field}="):
        dataclasses.replace(group, **{field: value})


@pytest.mark.parametrize(
    "change",
    [
        dict(module=None), dict(axis=2), dict(axis=True), dict(axis=-1), dict(group_size=0), dict(group_size="8"),
        dict(start=-1), dict(parameter=""), dict(index=-1), dict(index="0"), dict(bias=""), dict(bias=1),
    ],
    ids=str,
)  # fmt: skip
def test_members(change):
    with pytest.raises(HywiaError, match="member: expected"):
        Member(**{"module": "m", "axis": 0, "group_size": 8, **change})


def test_scores_that_were_written_to_are_not_ranked(scores):
    scores.values[NAME][3] = NAN
    with pytest.raises(HywiaError, match=f"{NAME}: expected finite scores"):
        hk.plan(scores, ratio=0.2, align=8)


def test_they_are_equal_to_themselves_and_hashable(scores, statistics, plan):
    for one in (scores, statistics, plan):
        assert one == one
        assert one != dataclasses.replace(one)
        assert len({one, one, dataclasses.replace(one)}) == 2
    assert scores.groups == copy.deepcopy(scores.groups)


def test_records_cannot_be_changed_and_are_json(scores, statistics, plan):
    for one in (scores, statistics, plan):
        assert json.loads(json.dumps(one.record)) == one.record
        for change in (
            lambda r: r.update(a=1),
            lambda r: r.__setitem__("a", 1),
            lambda r: r.pop("versions", None),
            lambda r: r.clear(),
            lambda r: r.setdefault("a", 1),
            lambda r: r.__ior__({"a": 1}),
        ):
            with pytest.raises(TypeError, match="record: cannot be changed"):
                change(one.record)
    with pytest.raises(TypeError, match="cannot be changed"):
        scores.record["statistics"]["seed"] = 3


def test_a_record_is_a_copy(scores):
    given = {"list": [1], "inner": {"a": 1}}
    kept_ = dataclasses.replace(scores, record=given).record
    given["list"].append(2)
    given["inner"]["a"] = 2
    assert kept_ == {"list": [1], "inner": {"a": 1}}


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_they_can_be_copied(scores, statistics, plan, how):
    again = how(scores)
    assert (again.groups, again.record, again.parameters) == (scores.groups, scores.record, scores.parameters)
    assert all(torch.equal(again.values[n], v) for n, v in scores.values.items())
    assert how(plan).keep.keys() == plan.keep.keys()
    assert isinstance(how(statistics), Statistics)


def test_made_by_hand():
    group = Group("l.mlp", "mlp", 0, 3, "channel", (Member("up", 0, 1), Member("down", 1, 1)), 8)
    values = {"l.mlp": torch.tensor([3.0, 1.0, 2.0])}
    plan = hk.plan(Scores((group,), values, {}, 100, "x"), group_ratio=0.4, units=("mlp",), align=1)
    assert plan.keep["l.mlp"].tolist() == [0, 2]
    assert Plan((group,), {"l.mlp": torch.tensor([1])}, 100, 84, "adaptive", "").ratio == pytest.approx(0.16)

"""A model's work is known for every family before the cut, and eager figures are there for all."""

from __future__ import annotations

import pytest

import hywia_kernels as hk
from hywia_kernels.deploy.cost import cost_of
from hywia_kernels.deploy.speed import Case, measure
from tests.support.families import FAMILIES


@pytest.fixture(params=FAMILIES, ids=lambda f: f.name)
def model(request):
    return request.param.build()


def test_work_after_a_plan_is_work_after_the_cut(model):
    kinds = {g.kind for g in hk.groups(model)}
    units = tuple(k for k in ("mlp", "attention") if k in kinds)
    plan = hk.plan(hk.score(model, criterion="random", seed=1), group_ratio=0.4, units=units, align=4)
    before, told = cost_of(model), cost_of(model, plan)
    hk.prune(model, plan)
    assert told == cost_of(model)
    assert told.prefill_flops(1, 8) < before.prefill_flops(1, 8)
    assert told.decode_bytes(2, 8) < before.decode_bytes(2, 8)
    figures, _ = measure(model, [Case("decode", 1, 8)], modes=("eager",), runs=2)
    assert [f.tokens_per_second > 0 for f in figures] == [True]

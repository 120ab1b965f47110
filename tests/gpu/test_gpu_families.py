"""Every family of the table on a CUDA device: statistics by each pass against the CPU's, and cuts against masks."""

from __future__ import annotations

import copy

import pytest
import torch

import hywia_kernels as hk
from tests.support.comparison import distance, logits, relative
from tests.support.cuts import CUTS, make_plan
from tests.support.families import FAMILIES, fresh, token_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_statistics_equal_the_cpus(family):
    tokens = token_ids()
    samples = [tokens[0], tokens[1, :7], tokens[2, :2], tokens[3, :11]]
    want = hk.calibrate(fresh(family), samples, engine="autograd")
    model = fresh(family).to(DEVICE)
    for engine, memory in (("fused", "fast"), ("fused", "lean"), ("autograd", "fast")):
        assert distance(hk.calibrate(model, samples, engine=engine, memory=memory), want) <= 1e-3, (engine, memory)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_pruned_equals_masked(family):
    tokens = token_ids().to(DEVICE)
    for cut in CUTS:
        model = fresh(family).to(DEVICE)
        masked, plan = copy.deepcopy(model), make_plan(model, cut)
        hk.mask(masked, plan)
        hk.prune(model, plan)
        assert relative(logits(model, tokens), logits(masked, tokens)) <= 1e-5, cut

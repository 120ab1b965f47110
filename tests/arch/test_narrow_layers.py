"""A refit whose MLPs compute only the channels that stay solves what one with masked channels solves."""

from __future__ import annotations

import copy

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.method import reconstruction
from tests.support.families import FAMILIES, fresh

# Their MLPs are no plain linear layers, each of one matrix: packed, stored [in, out], or stacked experts.
MASKED = {"gpt2", "phi3", "phi3-longrope", "mixtral"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_same_is_solved(family, monkeypatch):
    model = fresh(family)
    masked = copy.deepcopy(model)
    text = torch.randint(0, 50, (6, 11), generator=torch.Generator().manual_seed(1))
    kinds = tuple(kind for kind in ("mlp", "attention") if any(g.kind == kind for g in hk.groups(model)))
    scores = hk.score(model, criterion="random", seed=1)
    plan = hk.plan(scores, group_ratio=0.4, units=kinds, align=1)
    original, counts = reconstruction.narrowed, []

    def noted(*arguments):
        replaced = original(*arguments)
        counts.append(len(replaced))
        return replaced

    monkeypatch.setattr(reconstruction, "narrowed", noted)
    got = hk.reconstruct(model, plan, text).record["refit"]["relative_error"]
    monkeypatch.setattr(reconstruction, "narrowed", lambda *_: [])
    want = hk.reconstruct(masked, plan, text).record["refit"]["relative_error"]
    assert any(counts) is (family.name not in MASKED)
    assert got.keys() == want.keys()
    for name, (before, after) in want.items():
        assert got[name] == pytest.approx([before, after], rel=1e-3, abs=1e-6)
    assert not any("forward" in vars(module) for module in model.modules())

"""Layers trained on a GPU: steps that are captured give what plain ones do, and a run repeats."""

from __future__ import annotations

import copy

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.method import layer_training
from tests.support.models import random_model, sizes

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


def made(dtype=torch.float32):
    model = random_model(seed=0, **sizes(259, 256, 512, 3, 8, 4), head_dim=32, initializer_range=0.06)
    return model.to("cuda", dtype)


def reconstructed(model, passes=2):
    text = torch.randint(0, 256, (512, 128), generator=torch.Generator().manual_seed(3))
    values = hk.score(model, criterion="random", seed=2)
    plan = hk.plan(values, group_ratio=0.5, units=("mlp", "attention"), align=16)
    model = copy.deepcopy(model)
    after = hk.reconstruct(model, plan, text, passes=passes)
    return model, after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_are_plain_ones(monkeypatch, dtype):
    captured, calls = layer_training._Trained._captured, []
    monkeypatch.setattr(
        layer_training._Trained, "_captured", lambda self, *a: calls.append(captured(self, *a)) or calls[-1]
    )
    model = made(dtype)
    mine = reconstructed(model)[1]
    assert len(calls) == 3
    assert all(call is not None for call in calls)
    monkeypatch.setattr(layer_training, "_CAPTURED_STEPS", 10**9)
    theirs = reconstructed(model)[1]
    mine, theirs = (x.record["refit"]["layer_error"] for x in (mine, theirs))
    for index, (before, after) in theirs.items():
        assert after < 0.99 * before
        assert mine[index] == pytest.approx([before, after], rel=2e-2), index


def test_a_run_repeats():
    model = made()
    assert reconstructed(model)[1].fingerprint == reconstructed(model)[1].fingerprint

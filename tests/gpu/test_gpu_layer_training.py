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


def captures(monkeypatch):
    """The graphs that layers are trained by, one a layer, filled as they are."""
    captured, graphs = layer_training._Trained._captured, []
    monkeypatch.setattr(
        layer_training._Trained, "_captured", lambda self, *a: graphs.append(captured(self, *a)) or graphs[-1]
    )
    return graphs


def errors(model):
    return reconstructed(model)[1].record["refit"]["layer_error"]


def same_as_plain(monkeypatch, model, mine):
    monkeypatch.setattr(layer_training, "_CAPTURED_STEPS", 10**9)
    for index, (before, after) in errors(model).items():
        assert after < 0.99 * before
        assert mine[index] == pytest.approx([before, after], rel=2e-2), index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_are_plain_ones(monkeypatch, dtype):
    graphs = captures(monkeypatch)
    model = made(dtype)
    mine = errors(model)
    assert len(graphs) == 3
    assert graphs[0] is not None
    assert graphs[0] is graphs[1] is graphs[2]  # layers that look alike share it
    same_as_plain(monkeypatch, model, mine)


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "told by its loss"])
def test_a_layer_of_another_kind_has_a_graph_of_its_own(monkeypatch, seen):
    graphs = captures(monkeypatch)
    model = made()
    model.model.layers[1].self_attn.scaling *= 3.0
    if not seen:
        monkeypatch.setattr(layer_training, "_settings", lambda module: {})
    mine = errors(model)
    assert None not in graphs
    assert len({id(graph) for graph in graphs}) == 3
    same_as_plain(monkeypatch, model, mine)


def test_a_run_repeats():
    model = made()
    assert reconstructed(model)[1].fingerprint == reconstructed(model)[1].fingerprint

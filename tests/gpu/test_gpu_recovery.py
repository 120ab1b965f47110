"""Recovery on a CUDA device: steps that are compiled and captured are the steps that they replace."""

from __future__ import annotations

import copy

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import arch
from hywia_kernels.engine.static_driver import drivable
from hywia_kernels.method.criteria import magnitude
from hywia_kernels.method.recovery import stepping
from hywia_kernels.method.recovery.distilled import Distilled
from hywia_kernels.method.recovery.stepping import CapturedStep, captured_step, compiled
from hywia_kernels.method.recovery.teacher import Live, Remembered
from hywia_kernels.method.recovery.text import given
from hywia_kernels.method.recovery.tuning import prepared
from tests.support.models import random_model, sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SAMPLES, LENGTH = 8, 32


@pytest.fixture(scope="module")
def pair():
    """A dense model and one of half its channels."""
    dense = random_model(**sizes(512, 128, 256, layers=3, heads=4, kv_heads=2), initializer_range=0.05).to("cuda")
    cut = copy.deepcopy(dense)
    hk.prune(cut, hk.plan(magnitude(cut), group_ratio={"mlp": 0.5}))
    return dense, cut


def tokens(seed, samples=SAMPLES):
    return torch.randint(0, 512, (samples, LENGTH), generator=torch.Generator().manual_seed(seed))


def gradients(distilled):
    return {name: p.grad.clone() for name, p in distilled.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tune", ["full", "scales", "lora"])
@pytest.mark.parametrize("many", [0, 10**9], ids=["eager", "compiled"])
def test_a_captured_step_leaves_the_gradients_of_a_plain_one(pair, tune, many, monkeypatch):
    monkeypatch.setattr(stepping, "uncompiled", lambda: pytest.fail("what was compiled could not be captured"))
    dense, cut = pair[0], copy.deepcopy(pair[1])
    with prepared(cut, tune, 4) as tuned:
        distilled = Distilled(cut, tuned, Live(dense), 0.1, autocast=False)
        index, batches = torch.arange(SAMPLES), [tokens(seed).cuda() for seed in (1, 2)]
        losses = []
        for batch in batches:
            loss = distilled(batch, index)["loss"] / 2
            loss.backward()
            losses.append(float(loss.detach()))
            del loss  # its graph would hold the nodes that add up gradients on this stream
        want = gradients(distilled)
        distilled.zero_grad()
        with compiled(distilled, many):
            step = captured_step(distilled, SAMPLES, LENGTH)
            assert step is not None
            assert all(p.grad is None for p in distilled.parameters())
            assert [float(step(batch, index, 0.5)) for batch in batches] == pytest.approx(losses, rel=1e-4)
            got = gradients(distilled)
            distilled.zero_grad()
            assert float(step(batches[0], index, 1.0)) == pytest.approx(2 * losses[0], rel=1e-4)
    assert want.keys() <= got.keys()
    for name, gradient in got.items():
        exact = want.get(name, torch.zeros_like(gradient))
        assert float((gradient - exact).norm()) <= 1e-3 * float(exact.norm()) + 1e-9, name
    assert all(layer._compiled_call_impl is None for layer in arch.layers_of(cut))


def test_a_captured_step_reads_what_was_remembered(pair):
    dense, cut = pair[0], copy.deepcopy(pair[1])
    text = given(tokens(4, 40), hk.Recovery(held_out=8))
    remembered = Remembered.made(Live(dense), text, autocast=False)
    assert remembered is not None
    assert remembered.at_hand
    with prepared(cut, "full", 4) as tuned:
        live, again = (Distilled(cut, tuned, by, 0.0, autocast=False) for by in (Live(dense), remembered))
        step = captured_step(again, SAMPLES, LENGTH)
        assert step is not None
        for index in (torch.arange(3, 11), torch.arange(20, 28)):
            batch = text.train[index].cuda()
            assert float(step(batch, index, 1.0)) == pytest.approx(float(live(batch, index)["loss"].detach()), rel=1e-4)


def test_recovery_captures_and_comes_nearer(pair, monkeypatch):
    dense, cut = pair[0], copy.deepcopy(pair[1])
    made: list[CapturedStep] = []

    def spy(distilled, samples, length):
        step = captured_step(distilled, samples, length)
        assert step is not None
        made.append(step)
        return step

    request = hk.Recovery(tokens=40 * SAMPLES * LENGTH, tune="full", rate=2e-4, batch=SAMPLES, held_out=8, checks=2)
    text = tokens(3, 72)
    monkeypatch.setattr("hywia_kernels.method.recovery.training.captured_step", spy)
    captured = hk.recover(cut, dense, None, request, tokens=text)
    assert len(made) == 1
    assert captured.record["captured"] is True
    monkeypatch.setattr("hywia_kernels.method.recovery.training.captured_step", lambda *_: None)
    plain = hk.recover(copy.deepcopy(pair[1]), dense, None, request, tokens=text)
    assert captured.after < 0.95 * captured.before
    assert captured.after == pytest.approx(plain.after, rel=0.02)


def test_a_model_that_asks_the_host_is_not_captured(pair, monkeypatch):
    dense, cut = pair[0], copy.deepcopy(pair[1])
    layer = arch.layers_of(cut)[0]
    asking = layer.register_forward_hook(lambda module, arguments, output: float(arguments[0].sum()) and None)
    with prepared(cut, "full", 4) as tuned:
        distilled = Distilled(cut, tuned, Live(dense), 0.0, autocast=False)
        assert captured_step(distilled, SAMPLES, LENGTH) is None
        loss = distilled(tokens(1).cuda(), torch.arange(SAMPLES))["loss"]
        asking.remove()
    assert bool(loss.isfinite())


def test_products_in_tf32_do_not_send_the_writer_to_generate():
    model = random_model(**sizes(512, 256, 512, layers=12, heads=4, kv_heads=2), initializer_range=0.2).to("cuda")
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert drivable(model, 64) is None
        assert torch.backends.cuda.matmul.allow_tf32 is True
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False

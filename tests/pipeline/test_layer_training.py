"""Layers trained after their matrices are solved: by the stated loss, never for the worse, the same after the cut."""

from __future__ import annotations

import copy

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import UsageError
from hywia_kernels.engine.samples import padded
from hywia_kernels.method import layer_training
from hywia_kernels.method.layer_targets import layer_target, run_of
from hywia_kernels.method.layer_training import LayerTraining, alike_runs, relative_error
from hywia_kernels.method.narrow_layers import narrowed
from hywia_kernels.method.surgery import zero_units
from hywia_kernels.method.training_runs import parted, parts_of
from tests.support.tiny import TINY, fresh, make_plan


@pytest.fixture
def text():
    return torch.randint(0, 256, (24, 19), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    monkeypatch.setattr("hywia_kernels.method.training_runs.TRAINED_TOKENS", 60)


@pytest.fixture(autouse=True)
def float32_products(monkeypatch):
    """As on a CPU without a matrix unit."""
    monkeypatch.setattr(layer_training, "multiplies_bfloat16", lambda device: False)


def masked_layer(text, index=1):
    """`(layer, masked; plan; runs that enter it; what the dense layer sends on; its narrow linear layers)`."""
    model = fresh(TINY[2])
    layers = model.model.layers
    runs = [run_of(model, layers, chunk) for chunk in padded(text).chunks(60)]
    for run in runs:
        for layer in layers[:index]:
            run.dense = run.calls[0](layer, run.dense)
        run.pruned = run.dense
    targets = [layer_target(layers[index], index, {}, run, True, []) for run in runs]
    plan = make_plan(model, "mlp")
    groups = [g for g in plan.groups if g.layer == index]
    for group in groups:
        zero_units(model, group, plan.keep[group.name])
    return layers[index], plan, runs, targets, narrowed(model, groups, plan.keep)


@torch.no_grad()
def test_the_first_step_goes_down_the_gradient_of_the_stated_loss(text):
    layer, _, runs, targets, _ = masked_layer(text[:3])
    before = {name: p.clone() for name, p in layer.named_parameters()}
    want = copy.deepcopy(layer)
    with torch.enable_grad():
        for parameter in want.parameters():
            parameter.requires_grad_()
        out = runs[0].calls[1](want, runs[0].pruned)
        goal = targets[0].out
        weight = 1 / goal.square().mean(-1, keepdim=True)
        loss = ((goal - out).square() * weight).mean()
        loss.backward()
    assert relative_error(layer, 1, runs, targets) == pytest.approx(float(loss), rel=1e-5)
    LayerTraining(1).train(layer, 1, runs, targets)
    rate = min(3e-3, 1.728 / runs[0].pruned.shape[-1])  # AdamW's first step is the rate against the gradient's sign
    for name, parameter in want.named_parameters():
        steep = parameter.grad.abs() > 1e-5
        moved = dict(layer.named_parameters())[name] - before[name]
        assert torch.allclose(moved[steep], -rate * parameter.grad[steep].sign(), rtol=1e-2), name


@torch.no_grad()
def test_at_the_cut_width_the_same_comes_of_it(text):
    layer, _, runs, targets, narrow = masked_layer(text)
    other, run_again, goals = copy.deepcopy(layer), runs, targets
    _, (before, after) = LayerTraining(3).train(layer, 1, runs, targets, narrow)
    _, plainly = LayerTraining(3).train(other, 1, run_again, goals)
    assert after < 0.95 * before
    assert [before, after] == pytest.approx(plainly, rel=1e-4)
    for name, parameter in other.named_parameters():
        assert torch.allclose(dict(layer.named_parameters())[name], parameter, atol=3e-4), name


@pytest.mark.parametrize("name", ["mlp", "attention", "both", "adaptive"])
def test_what_leaves_the_layers_gets_nearer_and_cuts_like_any(model, text, name):
    plan = make_plan(model, name)
    after = hk.reconstruct(model, plan, text, ridge=1e-3, passes=4)
    errors = after.record["refit"]["layer_error"]
    first = min(g.layer for g in plan.groups if plan.keep[g.name].numel() < g.units)
    assert [int(index) for index in errors] == list(range(first, len(model.model.layers)))
    assert all(new <= old for old, new in errors.values())
    assert sum(new < 0.99 * old for old, new in errors.values()) >= 1
    with torch.no_grad():
        want = model(text[:4]).logits
        hk.prune(model, after)
        assert torch.allclose(model(text[:4]).logits, want, atol=1e-5)


def test_a_run_repeats_and_passes_count(text):
    plan = make_plan(fresh(TINY[2]), "both")
    several = [fresh(TINY[2]) for _ in range(3)]
    after = [hk.reconstruct(m, plan, text, passes=passes) for m, passes in zip(several, (2, 2, 3), strict=True)]
    assert after[0].fingerprint == after[1].fingerprint != after[2].fingerprint
    assert [x.record["refit"]["passes"] for x in after] == [2, 2, 3]


def test_a_layer_that_training_takes_away_is_left_as_it_was_solved(monkeypatch, text):
    monkeypatch.setattr(layer_training, "_RATE", 1e3)
    monkeypatch.setattr(layer_training, "_BY_SIZE", 1e9)
    plan = make_plan(fresh(TINY[2]), "both")
    solved, trained = fresh(TINY[2]), fresh(TINY[2])
    hk.reconstruct(solved, plan, text)
    after = hk.reconstruct(trained, plan, text, passes=1)
    assert all(old == new for old, new in after.record["refit"]["layer_error"].values())
    for one, other in zip(solved.parameters(), trained.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)  # in chunks of other sizes


def test_sixteen_bits_are_trained_in_float32(text):
    model = fresh(TINY[2]).to(torch.bfloat16)
    plan = make_plan(model, "both")
    after = hk.reconstruct(model, plan, text, ridge=1e-2, passes=4)
    errors = after.record["refit"]["layer_error"]
    assert all(new <= old for old, new in errors.values())
    assert any(new < 0.97 * old for old, new in errors.values())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_runs_that_are_padded_otherwise_are_not_alike():
    """Only runs of whole samples, or padded in the same places, go through a step that was made for one of them."""
    model = fresh(TINY[2])
    lengths = (7, 7, 7, 5, 6, 6)
    samples = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    text = padded(samples)
    runs = [run_of(model, model.model.layers, part) for part in text.chunks(14)]
    assert [len(run.pruned) for run in runs] == [2, 2, 2]
    assert alike_runs(runs, 1) == [True, False, False]
    whole = [run_of(model, model.model.layers, part) for part in padded([samples[0]] * 6).chunks(14)]
    assert alike_runs(whole, 1) == [True, True, True]


@torch.no_grad()
def test_parts_of_a_run_are_runs_of_their_samples():
    """Padded to their own longest sample, with the weights of their own tokens."""
    model = fresh(TINY[2])
    layers = model.model.layers
    lengths = (5, 6, 6, 7, 9, 9, 11, 30, 31)
    text = padded([torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths])
    chunks = text.chunks(100)
    runs = [run_of(model, layers, chunk) for chunk in chunks]
    targets = [layer_target(layers[0], 0, {}, run, True, []) for run in runs]
    mine, goals = parted([parts_of(model, layers, chunk) for chunk in chunks], runs, targets)
    smaller = [part for chunk in chunks for part in chunk.chunks(60)]
    assert [tuple(run.pruned.shape[:2]) for run in mine] == [tuple(part.tokens.shape) for part in smaller]
    assert len(runs) < len(mine) < len(text)
    for part, run, goal in zip(smaller, mine, goals, strict=True):
        want = run_of(model, layers, part)
        target = layer_target(layers[0], 0, {}, want, True, [])
        assert torch.equal(run.flat(run.pruned), want.flat(want.pruned))
        assert torch.allclose(run.flat(goal.out), want.flat(target.out), atol=1e-5)
        assert torch.allclose(goal.weight, target.weight, rtol=1e-4)
        assert torch.allclose(
            run.flat(run.calls[1](layers[1], run.pruned)), want.flat(want.calls[1](layers[1], want.pruned))
        )


@torch.no_grad()
def test_layers_look_alike_or_do_not(text):
    """A step that was captured for one layer is another's where nothing that it computes by differs."""
    layer, plan, _, _, narrow = masked_layer(text)
    model = fresh(TINY[2])
    traits = layer_training._Place.of(layer, 1, narrow).traits()
    other = model.model.layers[0]
    cut = [g for g in plan.groups if g.layer == 0]
    alike = narrowed(model, cut, plan.keep)
    assert layer_training._Place.of(other, 0, alike).traits() == traits
    assert layer_training._Place.of(other, 0, ()).traits() != traits  # at its whole width
    other.self_attn.scaling *= 2.0
    assert layer_training._Place.of(other, 0, alike).traits() != traits
    other.self_attn.scaling /= 2.0
    other.mlp.gate_proj.bias = torch.nn.Parameter(torch.zeros(len(other.mlp.gate_proj.weight)))
    assert layer_training._Place.of(other, 0, alike).traits() != traits


@torch.no_grad()
def test_errors_are_of_runs_all_over_the_text(monkeypatch, text):
    layer, _, runs, targets, narrow = masked_layer(text)
    assert len(runs) == 8
    monkeypatch.setattr(layer_training, "_JUDGED_RUNS", 3)
    want = relative_error(layer, 1, [runs[i] for i in (0, 2, 4, 6)], [targets[i] for i in (0, 2, 4, 6)])
    _, (before, _) = LayerTraining(1).train(layer, 1, runs, targets, narrow)
    assert before == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("passes", [-1, 1.0, True, "1"])
def test_passes_that_are_no_number(model, text, passes):
    with pytest.raises(UsageError, match="passes: expected a whole number from 0, got"):
        hk.reconstruct(model, make_plan(model, "mlp"), text, passes=passes)


def test_by_default_a_gpu_trains_layers_and_a_cpu_does_not():
    assert hk.Recipe(ratio=0.5).resolved("cpu").layer_passes == 0
    assert hk.Recipe(ratio=0.5).resolved("cuda", 135_000_000).layer_passes == 8
    assert hk.Recipe(ratio=0.5).resolved("cuda", 7_000_000_000).layer_passes == 1
    assert hk.Recipe(ratio=0.5, layer_passes=3).resolved("cuda", 7_000_000_000).layer_passes == 3
    assert hk.Recipe(ratio=0.5, reconstruct=False).resolved("cuda").layer_passes is None
    with pytest.raises(UsageError, match="layer_passes: expected at least 0, got -1"):
        hk.Recipe(ratio=0.5, layer_passes=-1).check()

"""Head ranking and reconstruction run layer by layer, no further than they need, and hold no more than they say."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.method import equations, head_residual, reconstruction
from hywia_kernels.method.head_residual import head_residuals
from hywia_kernels.method.moments import add_products, zero_moments
from tests.support.cuts import make_plan
from tests.support.tiny import TINY, fresh


@pytest.fixture
def text():
    return torch.randint(0, 256, (12, 19), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Three runs of the text."""
    for module in (head_residual, reconstruction):
        monkeypatch.setattr(module, "CHUNK_TOKENS", 4 * 19)


def counted(modules):
    """How often each module begins and ends."""
    counts = {name: [0, 0] for name in modules}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda m, a, name=name: counts[name].__setitem__(0, counts[name][0] + 1))
        module.register_forward_hook(lambda m, a, out, name=name: counts[name].__setitem__(1, counts[name][1] + 1))
    return counts


def test_heads_of_some_layers_are_those_of_all(model, text):
    whole = head_residuals(model, text)
    assert list(whole) == [f"model.layers.{i}.attention" for i in range(3)]
    for wanted in ((), (0,), (1,), (0, 2), (2, 1)):
        some = head_residuals(model, text, layers=wanted)
        assert list(some) == [f"model.layers.{i}.attention" for i in sorted(wanted)]
        for name, values in some.items():
            assert torch.equal(values, whole[name])


def test_moments_are_those_of_a_run_of_the_whole_model(gqa, text):
    """Bit for bit, run by run in the same order."""
    module, grams = gqa.model.layers[1].self_attn.o_proj, []
    hook = module.register_forward_pre_hook(lambda _, a: grams.append(a[0].reshape(-1, a[0].shape[-1])))
    with torch.no_grad():
        for run in text.split(4):
            gqa.model(run)
    hook.remove()
    gram = zero_moments(grams[0].shape[1], grams[0].shape[1], text.device)
    for x in grams:
        add_products(gram, x, x)
    group = next(g for g in hk.groups(gqa) if g.name == "model.layers.1.attention")
    residuals, shares = head_residual._energies(gqa, group, gram, text.numel())
    found = head_residuals(gqa, text)
    assert torch.equal(found[group.name], residuals)
    assert torch.equal(found.shares[group.name], shares)


def test_head_ranking_runs_no_further_than_the_last_output_matrix(gqa, text):
    layers = gqa.model.layers
    last = {"o": layers[1].self_attn.o_proj, "mlp": layers[1].mlp, "next": layers[2].mlp, "first": layers[0].mlp}
    counts = counted(last)
    head_residuals(gqa, text, layers=[1])
    # The first layer also runs once a run of samples to learn the layers' arguments.
    assert counts == {"o": [3, 0], "mlp": [0, 0], "next": [0, 0], "first": [6, 6]}


@pytest.mark.parametrize("held", [True, False])
def test_layers_run_no_further_and_no_more_often_than_needed(gqa, text, monkeypatch, held):
    if not held:
        monkeypatch.setattr(equations, "_HELD_BYTES", 0)
        monkeypatch.setattr(equations, "_HELD", 0.0)
    layer = gqa.model.layers[1]
    counts = counted({"o": layer.self_attn.o_proj, "mlp": layer.mlp})
    hk.reconstruct(gqa, make_plan(gqa, "both"), text)
    # Dense, the equations of o, and those of down; three runs of each. Where the last matrix's inputs are not held, the
    # refitted layer is run too.
    assert counts["o"][0] == (9 if held else 12)
    assert counts["mlp"] == ([6, 6] if held else [9, 9])


@pytest.mark.parametrize("cut", ["both", "mlp", "attention"])
@pytest.mark.parametrize("family", range(len(TINY)))
def test_held_inputs_end_a_layer_as_running_it_again_does(monkeypatch, text, family, cut):
    """But for the order in which the last product's terms are added."""
    models = fresh(TINY[family]), fresh(TINY[family])
    plan = make_plan(models[0], cut)
    after = [hk.reconstruct(models[0], plan, text)]
    monkeypatch.setattr(equations, "_HELD_BYTES", 0)
    monkeypatch.setattr(equations, "_HELD", 0.0)
    after.append(hk.reconstruct(models[1], plan, text))
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), name
    errors = [x.record["refit"]["relative_error"] for x in after]
    for name, (before, solved) in errors[0].items():
        assert errors[1][name] == pytest.approx([before, solved], rel=1e-4)


@pytest.mark.parametrize(("cut", "states"), [("both", 3), ("mlp", 2), ("attention", 3)])
def test_hidden_states_that_are_held(monkeypatch, text, cut, states):
    """Tensors `[samples, tokens, hidden]` that are alive while equations are solved, by their memory."""
    model = fresh(TINY[3])
    most = []
    refs: list[weakref.ref] = []

    def keep(module, arguments, output):
        refs.append(weakref.ref(output if isinstance(output, torch.Tensor) else output[0]))

    for layer in model.model.layers:
        for module in (layer, layer.self_attn.o_proj, layer.mlp.down_proj):
            module.register_forward_hook(keep)
    ended = equations.Begun.ended

    def end(self, matrix):
        out = ended(self, matrix)
        refs.append(weakref.ref(out))
        return out

    monkeypatch.setattr(equations.Begun, "ended", end)
    real = equations.NormalEquations.solve

    def solve(self, ridge):
        gc.collect()
        most.append(len({t.data_ptr() for r in refs if (t := r()) is not None and t.shape[-1] == 48}))
        return real(self, ridge)

    monkeypatch.setattr(equations.NormalEquations, "solve", solve)
    plan = make_plan(model, cut)
    hk.reconstruct(model, plan, text)
    assert len(most) == sum(plan.keep[g.name].numel() < g.units for g in plan.groups)
    assert max(most) == states * 3, "of three runs of samples; what the equations were made of is gone"

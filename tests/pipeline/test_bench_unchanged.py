"""Timing a model changes nothing in it: whoever owns it finds the parameters, flags and hooks that he knows."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from hywia_kernels.deploy.speed import Case, measure
from hywia_kernels.engine import static_driver
from hywia_kernels.engine.static_driver import StaticDriver, drivable
from tests.support.tiny import TINY, fresh


def state(model) -> dict:
    """Everything that somebody else may hold on to, or rely on."""
    modules = dict(model.named_modules())
    return {
        "parameters": [
            (n, id(p), p.data_ptr(), p._version, p.requires_grad, p.grad) for n, p in model.named_parameters()
        ],
        "storages": [(n, t.untyped_storage().data_ptr(), t.shape, t.stride()) for n, t in model.state_dict().items()],
        "buffers": [(n, id(b), b.clone().tolist()) for n, b in model.named_buffers()],
        "modules": [(n, id(m), m.training, sorted(vars(m))) for n, m in modules.items()],
        "hooks": [
            (n, *(list(h) for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)))
            for n, m in modules.items()
        ],
        "config": copy.deepcopy(model.config.to_dict()),
        "generation": copy.deepcopy(model.generation_config.to_dict()),
    }


@pytest.fixture(params=[2, 3, 4], ids=lambda i: TINY[i].name)
def model(request):
    made = fresh(TINY[request.param]).train()
    made.model.layers[1].eval()
    made.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    made.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out)
    return made


def alone(model) -> None:
    """No two tensors of the state share storage, but for those that the model ties."""
    seen = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        other = seen.setdefault(tensor.untyped_storage().data_ptr(), (name, tensor))
        assert other[1] is tensor, (name, other[0])


def test_bench_leaves_the_callers_model_alone(model, tmp_path):
    before, values = state(model), {n: p.clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    figures, reason = measure(model, [Case("prefill", 1, 8), Case("decode", 2, 8)], modes=("eager", "captured"), runs=2)
    assert (len(figures), reason) == (4, None)
    assert state(model) == before
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())
    alone(model)
    contents = {
        n: t for n, t in model.state_dict().items() if n != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    save_file(contents, tmp_path / "model.safetensors")
    assert all(torch.equal(t, contents[n]) for n, t in load_file(tmp_path / "model.safetensors").items())
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    optimiser.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, values[n])]
    assert "model.layers.1.self_attn.k_proj.weight" in moved
    assert "model.layers.0.self_attn.q_proj.weight" not in moved


@pytest.mark.parametrize("where", ["packing", "prefill", "step", "memory", "out of memory", "interrupt"])
def test_a_failure_leaves_it_alone_too(model, where, monkeypatch):
    before = state(model)
    error = {"out of memory": torch.OutOfMemoryError, "interrupt": KeyboardInterrupt}.get(where, RuntimeError)

    def fails(*args, **keywords):
        raise error("no")

    if where == "memory":
        monkeypatch.setattr(static_driver, "free_bytes", lambda device: 10)
    elif where in ("prefill", "step"):
        monkeypatch.setattr(StaticDriver, where, fails)
    else:
        real, calls = static_driver._packed, []
        monkeypatch.setattr(
            static_driver, "_packed", lambda *given: real(*given) if not calls and not calls.append(1) else fails()
        )
    if where == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            drivable(model)
    else:
        want = {"memory": "joined matrices do not fit beside it", "out of memory": "do not fit into memory beside it"}
        assert want.get(where, "its layers are not LLaMA's (no)") in drivable(model)
        figures, reason = measure(model, [Case("decode", 1, 8)], runs=2)
        assert [f.mode for f in figures] == ["eager"]
        assert reason == drivable(model)
    assert state(model) == before


def _held(made: StaticDriver) -> dict[int, int]:
    """Bytes of the matrices that a driver computes with, by their places in memory."""
    parts = [part for p in made.layers for part in (*p.qkv, *p.qkv_bias, *p.gate_up, *p.gate_up_bias)]
    return {part.untyped_storage().data_ptr(): part.nbytes for part in parts if part is not None}


def test_the_driver_holds_what_it_says(model):
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = _held(StaticDriver(model, 1, 8, compile=False))
    assert sum(held.values()) == static_driver.joined_bytes(model)
    assert not held.keys() & own
    assert _held(StaticDriver(model, 1, 8, compile=False, join=False)).keys() < own


def test_without_copies_it_computes_the_same(model, tokens):
    ids, steps = tokens[:, :8], [torch.tensor([i]) for i in range(8)]
    joined, apart = (StaticDriver(model, len(ids), 8, compile=False, join=join) for join in (True, False))
    torch.testing.assert_close(apart.prefill(ids), joined.prefill(ids), rtol=1e-5, atol=1e-5)
    for i, at in enumerate(steps):
        torch.testing.assert_close(
            apart.step(ids[:, i : i + 1], at), joined.step(ids[:, i : i + 1], at), rtol=1e-5, atol=1e-5
        )


def test_where_memory_is_short_nothing_is_copied(model, monkeypatch):
    own, needed = {p.untyped_storage().data_ptr() for p in model.parameters()}, static_driver.joined_bytes(model)
    for free, copied in ((4 * needed, True), (4 * needed - 4, False)):
        monkeypatch.setattr(static_driver, "free_bytes", lambda device, free=free: free)
        held = _held(StaticDriver(model, 1, 8, compile=False, join=None))
        assert (not held.keys() & own, held.keys() <= own) == (copied, not copied)
    monkeypatch.setattr(static_driver, "free_bytes", lambda device: 0)
    assert drivable(model, join=None) is None

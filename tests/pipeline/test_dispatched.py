"""Models that accelerate spread over devices keep the engine's nodes; offloaded ones are refused by name."""

from __future__ import annotations

import functools

import pytest
import torch
from state import assert_same, model_state

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.engine import block, dispatched
from tests.support.comparison import distance
from tests.support.families import fresh_named
from tests.support.tiny import TINY, fresh, make_plan


def assert_equal_statistics(got, want, *, exactly=True):
    """Of every unit, the same bits, or to float32's rounding."""
    assert got.fingerprint == want.fingerprint
    assert distance(got, want) <= (0.0 if exactly else 1e-5)


accelerate = pytest.importorskip("accelerate")
EVERY = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


def spread(model):
    """As over several devices, of which this machine has one: hooks on every module."""
    layers = {f"model.layers.{i}": "cpu" for i in range(len(model.model.layers))}
    return accelerate.dispatch_model(model, EVERY | layers, main_device="cpu", force_hooks=True)


@pytest.fixture
def nodes(monkeypatch):
    """The layers that ran as one node, each time."""
    ran = []
    right = block.Block.backward
    monkeypatch.setattr(block.Block, "backward", lambda self, *args: ran.append(self) or right(self, *args))
    return ran


@pytest.mark.parametrize("memory", ["fast", "lean", "layerwise"])
def test_a_spread_model_keeps_the_nodes(memory, gqa, tokens, nodes):
    want = hk.calibrate(fresh(TINY[2]), tokens, memory=memory)
    plainly = len(nodes)
    assert plainly >= 3
    model = spread(gqa)
    assert "forward" in vars(model.model.layers[1].mlp.up_proj)
    state = model_state(model)
    got = hk.calibrate(model, tokens, memory=memory)
    assert len(nodes) == 2 * plainly
    assert_same(state, model_state(model))
    assert_equal_statistics(got, want)
    assert got.record["not_fused"] is None


def test_families_without_such_a_node(tokens):
    for name in ("gemma2", "mixtral", "gpt2"):
        model, text = fresh_named(name), tokens % 131
        want = hk.calibrate(model, text)
        layers = "transformer.h" if name == "gpt2" else "model.layers"
        parts = ("wte", "wpe", "ln_f") if name == "gpt2" else ("embed_tokens", "rotary_emb", "norm")
        places = {f"{layers.rpartition('.')[0]}.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
        places |= {f"{layers}.{i}": "cpu" for i in range(3)}
        model = accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
        assert_equal_statistics(hk.calibrate(model, text), want)


def test_a_spread_model_is_refitted_cut_and_saved(gqa, tokens, tmp_path):
    plain, model = fresh(TINY[2]), spread(gqa)
    plan = make_plan(plain, "both")
    hk.prune(model, hk.reconstruct(model, plan, tokens))
    hk.prune(plain, hk.reconstruct(plain, plan, tokens))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    hk.save(model, None, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_only_what_moves_inputs_is_looked_through(gqa):
    model = spread(gqa)
    layer = model.model.layers[0]
    assert dispatched.entering_device(layer) == torch.device("cpu")
    assert dispatched.entering_device(fresh(TINY[2]).model.layers[0]) is None
    linear = layer.mlp.up_proj
    own = vars(linear)["forward"]
    linear.forward = functools.partial(own)  # somebody else's around it
    assert dispatched.entering_device(linear) is None
    linear.forward = own
    linear._hf_hook.offload = True
    assert dispatched.entering_device(linear) is None
    linear._hf_hook.offload = False
    accelerate.hooks.add_hook_to_module(linear, accelerate.hooks.ModelHook(), append=True)
    assert dispatched.entering_device(linear) is None
    other = fresh(TINY[2]).model.layers[0].mlp.up_proj
    other.forward = lambda x: x  # before accelerate's
    accelerate.hooks.add_hook_to_module(other, accelerate.hooks.AlignDevicesHook("cpu"))
    assert dispatched.entering_device(other) is None


def test_a_layer_on_two_devices_is_left_as_it_is(gqa, tokens, nodes):
    """Of one of its parts accelerate would move the inputs elsewhere, and whoever put it there wants that."""
    want = hk.calibrate(fresh(TINY[2]), tokens)
    nodes.clear()
    model = spread(gqa)
    model.model.layers[1].mlp.up_proj._hf_hook.execution_device = torch.device("cpu", 0)
    assert_equal_statistics(hk.calibrate(model, tokens), want, exactly=False)
    assert len(nodes) == 2


def test_arguments_are_moved_as_they_are_nested():
    one = torch.ones(2)
    given = {"a": one, "b": (one, [one, None]), "c": {"d": 3}}
    got = dispatched.moved(given, torch.device("meta"))
    assert got["a"].is_meta
    assert got["b"][0].is_meta
    assert got["b"][1][0].is_meta
    assert (got["b"][1][1], got["c"]) == (None, {"d": 3})


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "device_map"])
def test_offloaded_weights_are_refused_with_the_way_out(way, gqa, tokens, tokenizer, tmp_path):
    plan = make_plan(gqa, "both")
    if way == "device_map":
        from transformers import AutoModelForCausalLM

        gqa.save_pretrained(tmp_path / "in")
        layers = {f"model.layers.{i}": "cpu" if i else "disk" for i in range(3)}
        places = {**EVERY, **layers}
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "in", device_map=places, offload_folder=tmp_path / "off"
        )
    elif way == "cpu_offload":
        model = accelerate.cpu_offload(gqa, "cpu")
    else:
        model = accelerate.disk_offload(gqa, str(tmp_path / "off"), "cpu")
    message = r"weight: expected weights that are loaded, got them offloaded by accelerate .*; .*\(hk\.prune_files"
    for work in (
        lambda: hk.calibrate(model, tokens),
        lambda: hk.reconstruct(model, plan, tokens),
        lambda: hk.prune(model, plan),
        lambda: hk.save(model, tokenizer, tmp_path / "out"),
    ):
        with pytest.raises(HywiaError, match=message):
            work()
    assert not (tmp_path / "out").exists()

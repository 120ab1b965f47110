"""The functions that passes replace in transformers are there, and are what is called, in every family that names one.

A release that moves or wraps them must fail here: nothing else would show it but time.
"""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from transformers import DynamicCache

import hywia_kernels as hk
from hywia_kernels import arch
from hywia_kernels.engine import block, rotary
from hywia_kernels.engine.instrument import instrument
from hywia_kernels.engine.linear import Scorer
from hywia_kernels.engine.passes import apart
from hywia_kernels.engine.results import Results
from hywia_kernels.engine.samples import padded
from hywia_kernels.progress import Bar
from hywia_kernels.versions import cache_keyword
from tests.support.families import FAMILIES, fresh, token_ids

NAMED = [f for f in FAMILIES if arch.architecture(fresh(f)).attention.rotary]
BLOCKS = [f for f in FAMILIES if arch.architecture(fresh(f)).blocks]


def rotations(model, family):
    """How many of its layers rotate."""
    layers = model.get_submodule(arch.architecture(model).layers)
    without = [getattr(layer.self_attn, "use_rope", True) for layer in layers]
    return sum(bool(uses) for uses in without)


def test_the_families_that_name_one():
    names = {f.name for f in NAMED}
    assert {"llama", "mistral", "qwen2", "qwen3"} <= names
    assert {"llama", "mistral", "qwen2", "qwen3"} <= {f.name for f in BLOCKS}


@pytest.mark.parametrize("family", NAMED, ids=lambda f: f.name)
@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_the_rotation_that_is_called_is_the_one_in_its_place(family, engine, monkeypatch):
    model, calls = fresh(family), []
    monkeypatch.setattr(rotary, "usable", lambda device, backend: True)
    monkeypatch.setattr(rotary, "rotated", lambda original: lambda *a, **k: calls.append(1) or original(*a, **k))
    with rotary.rotary_replaced(model, None) as replaced, torch.no_grad():
        assert replaced
        model(token_ids())
    assert len(calls) == rotations(model, family) > 0
    del calls[:]
    with torch.no_grad():
        model(token_ids())
    assert not calls
    if engine == "fused":
        hk.calibrate(model, token_ids(), engine="fused", memory="fast")
        assert len(calls) == rotations(model, family)


def test_where_no_kernel_serves_nothing_is_replaced():
    model = fresh(NAMED[0])
    with rotary.rotary_replaced(model, None) as replaced:
        assert not replaced


@pytest.mark.parametrize("family", BLOCKS, ids=lambda f: f.name)
def test_layers_of_the_classes_that_are_named_run_as_one_node(family):
    model, samples = fresh(family), padded(token_ids())
    modules, found = dict(model.named_modules()), arch.groups(model)
    with Bar("", 1) as bar, apart(modules):
        scorer = Scorer(Results(modules, found, len(samples)), samples, 1.0, None, bar)
        replaced, _ = instrument(model, modules, found, scorer)
    layers = list(model.get_submodule(arch.architecture(model).layers))
    nodes = [module for module, forward in replaced if isinstance(forward, block.BlockForward)]
    assert nodes == layers


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_pass_warns_of_nothing(family, memory):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hk.calibrate(fresh(family), token_ids(), memory=memory)


@pytest.mark.parametrize("family", BLOCKS, ids=lambda f: f.name)
def test_a_layer_is_not_given_a_cache(family):
    """Under whatever name: one that this version does not know would go on to the attention function."""
    model = fresh(family)
    attention = type(model.get_submodule(arch.architecture(model).layers)[0].self_attn)
    known = inspect.signature(inspect.unwrap(attention.forward)).parameters
    given = block._without_cache({"past_key_values": None, "cache": None, "attention_mask": None, "use_cache": False})
    assert given == {"attention_mask": None, "use_cache": False}
    assert set(block.no_cache(attention)) <= set(known)
    for name in ("past_key_values", "cache", "layer_past"):
        with pytest.raises(AssertionError, match="keeps no cache"):
            block._without_cache({name: object()})


def test_a_cache_that_must_be_named_is_said_to_be_none():
    class Attention(torch.nn.Module):
        def forward(self, hidden_states, past_key_values, mask=None):
            return past_key_values

    assert block.no_cache(Attention) == {"past_key_values": None}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_keyword_of_the_cache_is_the_models_own(family):
    model = fresh(family)
    keyword = cache_keyword(type(model).forward)
    cache = DynamicCache(config=model.config)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        want = model(token_ids(), use_cache=False).logits[:, -1]
        model(token_ids()[:, :-1], use_cache=True, **{keyword: cache})
        got = model(token_ids()[:, -1:], use_cache=True, **{keyword: cache}).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

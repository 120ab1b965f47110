"""What the table cannot express is refused by the name of a module or a config field, before anything is touched."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import hywia_kernels as hk
from hywia_kernels import HywiaError
from tests.support.families import fresh_named


class Wrapped(nn.Module):
    """As adapters and quantisation wrap a layer."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("qwen2", "model.layers.1.self_attn.q_proj"),
        ("phi3", "model.layers.2.mlp.gate_up_proj"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value"),
        ("gpt2", "transformer.h.1.mlp.c_proj"),
        ("bloom", "transformer.h.1.self_attention.dense"),
    ],
)
def test_a_wrapped_layer_is_named(family, module):
    model = fresh_named(family)
    owner, _, leaf = module.rpartition(".")
    setattr(model.get_submodule(owner), leaf, Wrapped(model.get_submodule(module)))
    with pytest.raises(HywiaError, match=f"{module}: expected torch.nn.Linear or transformers' Conv1D, got Wrapped"):
        hk.groups(model)


def test_a_missing_module_is_named():
    model = fresh_named("opt")
    del model.model.decoder.layers[1].fc1
    with pytest.raises(HywiaError, match=r"expected a module 'model\.decoder\.layers\.1\.fc1', found none"):
        hk.groups(model)


def test_a_model_without_the_list_of_layers_is_refused():
    model = fresh_named("gemma3")
    model.model.language_model = nn.Identity()
    with pytest.raises(HywiaError, match=r"expected a list of layers 'model\.language_model\.layers'"):
        hk.groups(model)


@pytest.mark.parametrize(
    ("family", "field", "value"), [("bloom", "slow_but_exact", True), ("gpt2", "add_cross_attention", True)]
)
def test_config_values_an_entry_does_not_hold_for_are_named(family, field, value):
    model = fresh_named(family)
    setattr(model.config, field, value)
    with pytest.raises(HywiaError, match=f"expected {field}=False in the config of a {family} model, got True"):
        hk.calibrate(model, torch.zeros(1, 4, dtype=torch.long))


def test_interleaved_heads_that_share_keys_are_refused():
    model = fresh_named("gpt_neox")
    model.gpt_neox.layers[1].attention.query_key_value = nn.Linear(36, 36 + 2 * 18)
    with pytest.raises(HywiaError, match=r"layers\.1\.attention\.query_key_value: expected as many key heads as query"):
        hk.groups(model)


def test_a_fused_mlp_of_an_odd_width_is_refused():
    model = fresh_named("phi3")
    model.model.layers[0].mlp.gate_up_proj = nn.Linear(36, 87, bias=False)
    with pytest.raises(HywiaError, match=r"layers\.0\.mlp\.gate_up_proj: expected the rows of 2 matrices of one width"):
        hk.groups(model)


def test_experts_that_are_no_stack_are_refused():
    model = fresh_named("mixtral")
    experts = model.model.layers[2].mlp.experts
    del experts.down_proj
    experts.down_proj = nn.ModuleList([nn.Linear(12, 36) for _ in range(5)])
    with pytest.raises(HywiaError, match=r"layers\.2\.mlp\.experts: expected a stacked parameter 'down_proj'"):
        hk.groups(model)


@pytest.mark.parametrize(
    ("name", "parameter", "length", "said"),
    [
        ("qwen3_moe", "0.mlp.gate.bias", 5, "gate: expected one row of weights for each of 5 experts, and no bias"),
        ("olmo2", "1.self_attn.k_norm.weight", 17, "k_norm.weight: expected a vector with as many entries"),
    ],
    ids=["a router with a bias", "a norm that does not divide into heads"],
)
def test_vectors_that_are_no_units_are_refused(name, parameter, length, said):
    model = fresh_named(name)
    module, _, own = parameter.rpartition(".")
    setattr(model.model.layers.get_submodule(module), own, nn.Parameter(torch.ones(length)))
    with pytest.raises(HywiaError, match=re.escape(f"layers.{module.rpartition('.')[0]}.{said}")):
        hk.groups(model)


def test_logits_scaled_in_a_way_the_loss_does_not_know_are_refused():
    model = fresh_named("qwen3")
    model.config.logit_scale = 0.25
    with pytest.raises(HywiaError, match=r"config sets logit_scale=0\.25, which this loss would drop"):
        hk.calibrate(model, torch.zeros(1, 4, dtype=torch.long))

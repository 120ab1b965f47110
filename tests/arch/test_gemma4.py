"""Gemma 4: heads of two sizes, keys that are values, dense MLPs beside experts; the smallest models are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.method import loss_steps, proof
from tests.support.cuts import layer_plan
from tests.support.families import FAMILIES, fresh_named, randomised
from tests.support.tokenizers import byte_tokenizer

_FIELDS = next(f.config for f in FAMILIES if f.name == "gemma4_text")


def _made(**fields):
    torch.manual_seed(3)
    return randomised(Gemma4ForCausalLM(Gemma4TextConfig(**{**_FIELDS, **fields})).eval())


def test_which_heads_can_go():
    model = fresh_named("gemma4_text")
    sizes = [layer.self_attn.head_dim for layer in model.model.layers]
    assert sizes == [10, 10, 10, 12]
    # The last sliding layer's keys and values are handed on, and so are the full layer's, whose values are its keys.
    heads = {g.layer: (g.units, g.members[0].group_size) for g in hk.groups(model) if g.kind == "attention"}
    assert heads == {0: (3, 20), 1: (3, 20)}


def test_experts_beside_a_dense_mlp():
    model = _made(enable_moe_block=True, num_experts=5, top_k_experts=2, moe_intermediate_size=16)
    first = [g for g in hk.groups(model) if g.layer == 0]
    assert [(g.kind, g.units) for g in first] == [("attention", 3), *[("mlp", 16)] * 5, ("mlp", 44)]
    proof.check_cut(model)
    loss_steps.check_steps(model)
    proof.check_refit(model)
    proof.check_saved(model)


def test_a_checkpoint_says_what_its_layers_differ_in(tmp_path):
    model = fresh_named("gemma4_text")
    hk.prune(model, hk.plan(hk.score(model, criterion="random"), group_ratio=0.4, units=("mlp",), align=1))
    hk.save(model, byte_tokenizer(), tmp_path / "small")
    again, _ = hk.load(tmp_path / "small")
    assert {g.units for g in hk.groups(again) if g.kind == "mlp"} == {26}
    assert [layer.self_attn.head_dim for layer in again.model.layers] == [10, 10, 10, 12]
    with torch.no_grad():
        tokens = torch.arange(3, 19)[None]
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_whole_layers_stay():
    """Configs count the layers that differ, and the last one must be of full attention."""
    with pytest.raises(HywiaError, match="whole layers can go where the config says layer_types=None"):
        hk.prune(fresh_named("gemma4_text"), layer_plan(fresh_named("gemma4_text"), (0, 3)))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (
            dict(num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2),
            "num_kv_shared_layers=0",
        ),
        (dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=131), "hidden_size_per_layer_input=0"),
        (dict(use_bidirectional_attention="all"), "is_causal=True"),
    ],
)
def test_what_the_entry_does_not_hold_for_is_named(fields, name):
    with pytest.raises(HywiaError, match=f"expected {name} in the config of a gemma4_text model"):
        hk.groups(_made(**fields))

"""Gemma 4: heads of two sizes, keys that are values, dense MLPs beside experts, keys of other layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
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


def test_what_the_entry_does_not_hold_for_is_named():
    with pytest.raises(HywiaError, match="expected is_causal=True in the config of a gemma4_text model"):
        hk.groups(_made(use_bidirectional_attention="all"))


# As E2B and E4B: the last two of six layers take others' keys and values, and have MLPs of twice the width; every layer
# has an embedding of the tokens besides.
_KINDS = ["sliding_attention", "full_attention"]
_SMALL = dict(
    num_hidden_layers=6,
    layer_types=_KINDS * 3,
    num_kv_shared_layers=2,
    use_double_wide_mlp=True,
    attention_k_eq_v=False,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=131,
)


def test_layers_that_take_other_layers_keys_keep_their_heads():
    model = _made(**_SMALL)
    modes = [layer.self_attn.store_full_length_kv for layer in model.model.layers]
    assert modes == [False, False, True, True, False, False]
    assert [layer.self_attn.is_kv_shared_layer for layer in model.model.layers] == [False] * 4 + [True] * 2
    groups = hk.groups(model)
    assert {g.layer: g.units for g in groups if g.kind == "attention"} == {0: 3, 1: 3}
    assert {g.layer: g.units for g in groups if g.kind == "mlp"} == {0: 44, 1: 44, 2: 44, 3: 44, 4: 88, 5: 88}
    proof.check_cut(model)
    loss_steps.check_steps(model)
    proof.check_saved(model)
    proof.check_layers(model)
    loss_steps.check_gradients(model)


def test_layers_that_run_together_are_scored_and_cut_as_the_recipe_says():
    """What runs a layer by itself is left out by default, and refused where it is asked for."""
    model, tokens = _made(**_SMALL), torch.randint(2, 131, (40, 12), generator=torch.Generator().manual_seed(5))
    recipe = hk.Recipe(group_ratio=0.4, align=4, samples=4, seq_len=12)
    for field, value in (("reconstruct", True), ("search", "fast"), ("head_ranking", "residual")):
        with pytest.raises(UsageError, match=rf"{field}: expected .* none of them runs by itself, got {value!r}"):
            hk.compress(model, None, dataclasses.replace(recipe, **{field: value}), tokens=tokens)
    for memory in ("lean", "layerwise"):
        with pytest.raises(UsageError, match=f"memory: expected auto or fast .* got '{memory}'"):
            hk.calibrate(model, tokens[:4], memory=memory)
    plan = hk.plan(hk.score(model, criterion="random"), group_ratio=0.4, align=4)
    with pytest.raises(HywiaError, match="none of them runs by itself"):
        hk.reconstruct(model, plan, tokens)
    with pytest.raises(HywiaError, match="none of them can go whole"):
        hk.prune(model, layer_plan(model, (0, 1, 2, 3)))
    result = hk.compress(model, None, recipe, tokens=tokens)
    assert (result.recipe.reconstruct, result.recipe.search, result.recipe.head_ranking) == (False, "none", "scores")
    assert result.plan.record["scores"]["statistics"]["memory"] == "fast"
    assert sum(p.numel() for p in model.parameters()) == result.plan.parameters_after
    assert {g.units for g in hk.groups(model) if g.kind == "attention"} <= {1, 2}
    with torch.no_grad():
        assert torch.isfinite(model(tokens[:2]).logits).all()

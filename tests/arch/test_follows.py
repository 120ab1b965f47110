"""What modules and configs keep for themselves follows every cut: in memory a model is what it is after reload."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from test_contract import logits, make_plan
from transformers import AutoModelForCausalLM

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.arch.facts import fingerprint
from tests.support.families import FAMILIES, fresh, fresh_named, token_ids

CASES = [
    pytest.param(family, cut, id=f"{family.name}-{cut}")
    for family in FAMILIES
    for cut in ("mlp", "both", "adaptive", *(("experts", "all") if family.experts else ()))
]

# Of a model loaded from a directory, of its class, or of both; none is about what was cut.
LOADED = {"_weight_conversions", "_use_kernels", "name_or_path", "loss_type", "_forward_pre_hooks_with_kwargs"}
OF_THE_DIRECTORY = {"_name_or_path", "architectures", "dtype", "model_type", "auto_map", "transformers_version"}
ADAPTIVE = {"base_model_type", "layer_widths", "module_changes"}  # which only a written config holds at first
# A Llama written as Mistral.
STAND_IN = {"attention_bias", "mlp_bias", "pretraining_tp", "sliding_window"}


def plain(value) -> bool:
    if isinstance(value, (tuple, list)):
        return all(plain(v) for v in value)
    if isinstance(value, dict):
        return all(plain(v) for v in value.values())
    return value is None or isinstance(value, (int, float, str, bool))


def listed(value):
    return [listed(v) for v in value] if isinstance(value, (tuple, list)) else value


def attributes(module) -> dict:
    return {k: listed(v) for k, v in vars(module).items() if plain(v) and k not in LOADED}


def fields(config, stand_in: bool) -> dict:
    left_out = OF_THE_DIRECTORY | ADAPTIVE | (STAND_IN if stand_in else set())

    def kept(of) -> dict:
        return {k: kept(v) if isinstance(v, dict) else listed(v) for k, v in of.items() if k not in left_out}

    return kept(config.to_dict())


def assert_same(model, loaded) -> None:
    found, wanted = dict(model.named_modules()), dict(loaded.named_modules())
    assert found.keys() == wanted.keys()
    stand_in = model.config.model_type == "llama" and loaded.config.model_type == "mistral"
    for name, module in found.items():
        assert attributes(module) == attributes(wanted[name]), name
        if hasattr(getattr(module, "config", None), "to_dict"):
            assert fields(module.config, stand_in) == fields(wanted[name].config, stand_in), name


def reloaded(model, folder):
    hk.save(model, None, folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def trained(model, tokens, **more):
    """Loss and one gradient, in train mode, with the activations made again for backward."""
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    loss = model(tokens, labels=tokens, use_cache=False, **more).loss
    loss.backward()
    grad = model.get_output_embeddings().weight.grad.clone()
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_disable()
    model.eval()
    return loss.detach(), grad


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*:FutureWarning")
@pytest.mark.parametrize(("family", "cut"), CASES)
def test_a_pruned_model_is_what_it_is_after_reload(family, cut, tmp_path):
    model, tokens = fresh(family), token_ids()
    hk.prune(model, make_plan(model, cut))
    loaded = reloaded(model, tmp_path / "out")
    assert_same(model, loaded)
    assert torch.equal(logits(model, tokens), logits(loaded, tokens))
    for more in ({}, {"output_router_logits": True}) if family.experts else ({},):
        (loss, grad), (want, want_grad) = trained(model, tokens, **more), trained(loaded, tokens, **more)
        assert torch.equal(loss, want)
        assert torch.equal(grad, want_grad)
        assert torch.isfinite(loss)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_routers_auxiliary_loss_counts_the_experts_that_are_left(name, tmp_path):
    """Against its definition, experts x sum of (share of tokens sent x mean probability), written out."""
    model, tokens = fresh_named(name), token_ids()
    hk.prune(model, make_plan(model, "experts"))
    assert model.num_experts == 3
    with torch.no_grad():
        out = model(tokens, labels=tokens, output_router_logits=True)
    shares = torch.cat(list(out.router_logits)).softmax(-1)
    chosen = torch.nn.functional.one_hot(shares.topk(2, -1).indices, 3).float().mean(0)
    assert float(out.aux_loss) == pytest.approx(float((3 * chosen * shares.mean(0)).sum()), rel=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_layers_with_different_numbers_of_experts_have_no_auxiliary_loss(name, tmp_path):
    """Transformers joins all layers' router logits for it."""
    model, tokens = fresh_named(name), token_ids()
    model.config.output_router_logits = True
    before = {n: p.clone() for n, p in model.named_parameters()}
    plan = make_plan(model, "adaptive-experts")
    with pytest.raises(HywiaError, match=r"layers keep \[3, 5\] experts.*output_router_logits to False"):
        hk.prune(model, plan)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.config.output_router_logits = False
    plan = dataclasses.replace(plan, fingerprint=fingerprint(model))
    hk.prune(model, plan)
    loaded = reloaded(model, tmp_path / "out")
    assert_same(model, loaded)
    assert torch.equal(logits(model, tokens), logits(loaded, tokens))


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-longrope", "qwen3_moe"])
def test_a_cut_after_a_reload_follows_too(name, tmp_path):
    """The config of a model whose layers differ lists their widths, which a second cut changes."""
    model = fresh_named(name)
    hk.prune(model, make_plan(model, "adaptive"))
    model = reloaded(model, tmp_path / "one")
    before = copy.deepcopy(model.config.layer_widths)
    scores = hk.score(model, criterion="random", seed=9)
    hk.prune(model, hk.plan(scores, group_ratio=0.3, layers=(1, 2), units=("mlp", "attention"), align=4))
    loaded = reloaded(model, tmp_path / "two")
    assert_same(model, loaded)
    assert model.config.layer_widths == loaded.config.layer_widths != before
    assert model.config.module_changes == loaded.config.module_changes


def test_head_counts_that_no_stock_config_takes_are_told_from_any():
    """Longrope's factors fit one head count alone, which a cut model has no longer."""
    model = fresh_named("phi3-longrope")
    assert {g.stock_counts for g in hk.groups(model) if g.kind == "attention"} == {(3,)}
    hk.prune(model, make_plan(model, "attention"))
    assert {(g.units, g.stock_counts) for g in hk.groups(model) if g.kind == "attention"} == {(2, (3,))}
    assert model.config.num_attention_heads == 6, "whose factors it would not fit otherwise"
    assert model.model.layers[0].self_attn.config.num_attention_heads == 4
    assert {g.stock_counts for g in hk.groups(fresh_named("phi3")) if g.kind == "attention"} == {()}


def test_a_ratio_leaves_heads_alone_where_no_other_count_is_stock(tmp_path):
    model = fresh_named("phi3-longrope")
    plan = hk.plan(hk.score(model, criterion="random", seed=2), ratio=0.15, align=4)
    assert plan.widths("attention") == [3, 3, 3]
    assert plan.widths("mlp")[0] < 44
    hk.prune(model, plan)
    assert reloaded(model, tmp_path / "out").config.model_type == "phi3"

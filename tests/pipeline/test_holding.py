"""Models held in other ways: taken out of their wrappers, or refused by name with the way out."""

from __future__ import annotations

import types

import pytest
import torch
from state import assert_same, model_state, process_state
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import AutoModelForCausalLM

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError
from hywia_kernels.arch.holding import plain_model
from hywia_kernels.method.head_residual import head_residuals
from tests.support.tiny import TINY, fresh, make_plan


class Sharded(torch.Tensor):
    """A tensor whose values are elsewhere, as a DTensor's: its address is zero."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, requires_grad=like.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, function, kinds, arguments=(), keywords=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return arguments[0]
        raise AssertionError(f"{function} was run on a tensor without values")


def other_class(name, package, base=nn.Module):
    return type(name, (base,), {"__module__": f"{package}.of.it"})


def wrapped(name, attribute, model):
    wrapper = other_class(name, "torch")()
    setattr(wrapper, attribute, model)
    return wrapper


PASSES = {
    "calibrate": lambda model, tokens, plan: hk.calibrate(model, tokens),
    "leftover": lambda model, tokens, plan: head_residuals(model, tokens),
    "learn": lambda model, tokens, plan: hk.learn_masks(model, plan.scores, plan, tokens, steps=1),
    "refit": lambda model, tokens, plan: hk.reconstruct(model, plan, tokens),
    "mask": lambda model, tokens, plan: hk.mask(model, plan),
    "prune": lambda model, tokens, plan: hk.prune(model, plan),
    "save": lambda model, tokens, plan: hk.save(model, None, plan.folder / "out"),
}


@pytest.fixture
def planned(gqa, tmp_path):
    """A plan for the model, with the scores that it is of and a folder."""
    plan = make_plan(gqa, "both")
    object.__setattr__(plan, "scores", hk.score(gqa, criterion="random", seed=5))
    object.__setattr__(plan, "folder", tmp_path)
    return plan


def spoil(model, how):
    """The model, held as the name says; every one of these was somebody's."""
    layer = model.model.layers[1]
    if how == "meta":
        return model.to("meta")
    if how == "one meta weight":
        layer.mlp.up_proj.to("meta")
    elif how == "meta buffer":
        model.model.rotary_emb.register_buffer("inv_freq", torch.ones(4, device="meta"))
    elif how == "offloaded":
        layer.mlp.to("meta")
        layer.mlp.up_proj._hf_hook = types.SimpleNamespace(hooks=[types.SimpleNamespace(offload=True)])
        layer.mlp.gate_proj._hf_hook = types.SimpleNamespace(offload=True)
    elif how == "inference":
        with torch.inference_mode():
            layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.clone(), requires_grad=False)
    elif how == "sharded":
        layer.mlp.up_proj._parameters["weight"] = Sharded(layer.mlp.up_proj.weight)
    elif how == "freed":
        layer.mlp.up_proj.weight.data = torch.empty(0)
    elif how == "int8":
        layer.mlp.up_proj.weight = nn.Parameter(torch.ones(56, 48, dtype=torch.int8), requires_grad=False)
    elif how == "float8":
        layer.mlp.up_proj.weight = nn.Parameter(torch.ones(56, 48).to(torch.float8_e4m3fn), requires_grad=False)
    elif how == "sparse":
        layer.mlp.up_proj.weight = nn.Parameter(torch.eye(56, 48).to_sparse())
    elif how == "4 bit module":
        layer.mlp.up_proj.__class__ = other_class("Linear4bit", "bitsandbytes", nn.Linear)
    elif how == "adapter inside":
        layer.mlp.up_proj.__class__ = other_class("Linear", "peft", nn.Linear)
    elif how == "masked by torch":
        torch_prune.l1_unstructured(layer.mlp.up_proj, "weight", 0.5)
    elif how == "weight norm":
        torch.nn.utils.parametrizations.weight_norm(layer.mlp.up_proj)
    elif how == "a compiled layer inside":
        model.model.layers[1] = wrapped("OptimizedModule", "_orig_mod", layer)
    elif how == "a checkpointed layer":
        model.model.layers[1] = wrapped("CheckpointWrapper", "_checkpoint_wrapped_module", layer)
    elif how == "a sharded layer":
        model.model.layers[1] = wrapped("FullyShardedDataParallel", "module", layer)
    elif how == "sharded model":
        return wrapped("FullyShardedDataParallel", "module", model)
    elif how == "adapters":
        wrapper = other_class("PeftModelForCausalLM", "peft")()
        wrapper.base_model = model
        return wrapper
    elif how == "somebody's own wrapper":
        return wrapped("Policy", "actor", model)
    return model


REFUSALS = {
    "meta": r"model\.embed_tokens\.weight: .* meta device; load",
    "one meta weight": r"model\.layers\.1\.mlp\.up_proj\.weight: .* meta device; load",
    "meta buffer": r"model\.rotary_emb\.inv_freq: .* meta device; load",
    "offloaded": r'layers\.1\.mlp\.gate_proj\.weight: .* offloaded by accelerate .* without device_map="auto"',
    "inference": r"layers\.1\.mlp\.up_proj\.weight: .* torch\.inference_mode\(\); load the model outside",
    "sharded": r"layers\.1\.mlp\.up_proj\.weight: .* got Sharded of test_holding",
    "freed": r"layers\.1\.mlp\.up_proj\.weight: .* memory is elsewhere; load the model in one process",
    "int8": r"layers\.1\.mlp\.up_proj\.weight: expected an unquantised weight, got torch\.int8; load .* bfloat16",
    "float8": r"layers\.1\.mlp\.up_proj\.weight: expected an unquantised weight, got torch\.float8_e4m3fn",
    "sparse": r"layers\.1\.mlp\.up_proj\.weight: expected a dense weight, got torch\.sparse_coo",
    "4 bit module": r"layers\.1\.mlp\.up_proj: .* got Linear4bit of bitsandbytes; load the model in bfloat16",
    "adapter inside": r"layers\.1\.mlp\.up_proj: .* got Linear of peft; merge them first",
    "masked by torch": r"layers\.1\.mlp\.up_proj: .* \(weight_orig\); make it one: torch\.nn\.utils\.prune\.remove",
    "weight norm": r"layers\.1\.mlp\.up_proj: .*parametrize\.remove_parametrizations",
    "a compiled layer inside": r"model\.layers\.1: .* OptimizedModule; put its _orig_mod there",
    "a checkpointed layer": r"model\.layers\.1: .* CheckpointWrapper; put its _checkpoint_wrapped_module there",
    "a sharded layer": r"model\.layers\.1: .* FullyShardedDataParallel; its weights are sharded",
    "sharded model": r"model: .* FullyShardedDataParallel; its weights are sharded",
    "adapters": r"model: .* PeftModelForCausalLM; merge them first: model = model\.merge_and_unload\(\)",
    "somebody's own wrapper": r"model: expected the language model itself, got Policy around it; pass model\.actor",
}


@pytest.mark.parametrize("how", REFUSALS)
def test_what_cannot_be_worked_on_is_named_by_every_function(gqa, tokens, planned, how):
    model = spoil(gqa, how)
    before = process_state()
    for name, run in PASSES.items():
        with pytest.raises(HywiaError, match=REFUSALS[how]):
            run(model, tokens, planned)
        assert not (planned.folder / "out").exists(), name
    assert_same(before, process_state())


@pytest.mark.parametrize("thing", [None, "HuggingFaceTB/SmolLM2-135M", [1], object()], ids=lambda t: type(t).__name__)
def test_what_is_no_model_is_a_wrong_request(thing, tokens, planned):
    for run in PASSES.values():
        with pytest.raises(UsageError, match=rf"^model: expected a loaded .*, got {type(thing).__name__}; "):
            run(thing, tokens, planned)


def test_a_model_without_its_head(tokens):
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(fresh(TINY[2]).config)
    with pytest.raises(HywiaError, match="with its head, got LlamaForSequenceClassification; load it by Auto"):
        hk.calibrate(model, tokens)


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": torch.nn.DataParallel,
    "both": lambda model: torch.compile(torch.nn.DataParallel(model), backend="eager"),
    "distributed": lambda model: wrapped("DistributedDataParallel", "module", model),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_scored_as_it_is(tokens, wrap):
    model = fresh(TINY[2])
    want, left = hk.calibrate(model, tokens), head_residuals(model, tokens)
    outer = WRAPPERS[wrap](model)
    state = model_state(model)
    got = hk.calibrate(outer, tokens)
    assert got.fingerprint == want.fingerprint
    assert all(torch.equal(got.coarse[n], want.coarse[n]) for n in want.coarse)
    assert all(torch.equal(v, left[n]) for n, v in head_residuals(outer, tokens).items())
    assert hk.perplexity(outer, tokens) == hk.perplexity(model, tokens)
    assert_same(state, model_state(model))


@pytest.mark.parametrize("wrap", ["compiled", "parallel", "both"])
def test_a_wrapped_model_is_cut_inside(tokens, wrap, tmp_path):
    model, plain = fresh(TINY[2]), fresh(TINY[2])
    plan = make_plan(model, "both")
    outer = WRAPPERS[wrap](model)
    hk.prune(outer, hk.reconstruct(outer, plan, tokens))
    hk.prune(plain, hk.reconstruct(plain, plan, tokens))
    for (name, one), two in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two), name
    hk.save(outer, None, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.num_parameters() == plain.num_parameters() < fresh(TINY[2]).num_parameters()


def test_buckets_of_a_distributed_model_are_not_cut(gqa, tokens, planned):
    outer = wrapped("DistributedDataParallel", "module", gqa)
    for name in ("refit", "mask", "prune"):
        with pytest.raises(HywiaError, match=r"pass model\.module, and wrap the result again"):
            PASSES[name](outer, tokens, planned)
    assert plain_model(outer) is gqa


def test_hooks_that_move_inputs_between_devices_are_not_offloading(gqa, tokens):
    gqa.model.layers[1]._hf_hook = types.SimpleNamespace(offload=False)
    assert hk.calibrate(gqa, tokens).record["samples"] == 4

"""Whole layers cut out of a model of every family: what stays is the model with these layers skipped."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, arch
from hywia_kernels.arch.facts import fingerprint
from hywia_kernels.deploy import planning
from hywia_kernels.deploy.cost import cost_of
from hywia_kernels.method import surgery
from tests.support.comparison import logits, relative
from tests.support.cuts import layer_plan
from tests.support.families import FAMILIES, fresh, fresh_named, token_ids
from tests.support.processes import run_jobs
from tests.support.shapes import distinct
from tests.support.tokenizers import write_tokenizer
from tests.support.unchanged import assert_as_it_was, hooks_and_forwards, numbers, values

GOING = tuple(f for f in FAMILIES if not f.name.startswith("gemma4"))  # of which whole layers can go
every_family = pytest.mark.parametrize("family", GOING, ids=lambda f: f.name)
KEPT = ((0, 2), (1, 2), (1,))


def skipping(model, gone):
    """A copy of a model that hands on what enters the layers `gone`, written without the package's masks."""
    twin = copy.deepcopy(model)

    def hand_on(module, entered, out):
        return (entered[0], *out[1:]) if isinstance(out, tuple) else entered[0]

    for index in gone:
        twin.get_submodule(arch.architecture(twin).layers)[index].register_forward_hook(hand_on)
    return twin


def written(model, tokens, **settings):
    mask = torch.ones_like(tokens)
    return model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=6, **settings).tolist()


@every_family
def test_what_stays_is_the_model_without_the_layers(family):
    tokens = token_ids()
    for keep in KEPT:
        model = fresh(family)
        plan = layer_plan(model, keep)
        want = logits(skipping(model, plan.depth.gone), tokens)
        assert relative(want, logits(model, tokens)) > 1e-2, (
            "the layers must matter for the comparison to mean anything"
        )
        work, parameters = cost_of(model, plan), sum(p.numel() for p in model.parameters())
        hk.prune(model, plan)
        assert relative(logits(model, tokens), want) <= 1e-6
        assert cost_of(model) == work, "what a plan is said to save is what it saves"
        assert sum(p.numel() for p in model.parameters()) == plan.parameters_after < parameters
        config = arch.text_config(model)
        assert config.num_hidden_layers == len(keep) == len(arch.layers_of(model))
        indices = [m.layer_idx for layer in arch.layers_of(model) for m in layer.modules() if hasattr(m, "layer_idx")]
        assert sorted(set(indices)) == list(range(len(keep)))
        assert written(model, tokens[:2]) == written(model, tokens[:2], use_cache=False)


@every_family
def test_a_mask_stands_for_the_cut(family):
    tokens, model = token_ids(), fresh(family)
    plan = layer_plan(model, (0, 2), units=("mlp", "attention"))
    assert all(plan.keep[g.name].numel() < g.units for g in plan.staying if g.kind != "experts")
    masked = copy.deepcopy(model)
    if family.name == "opt-350m":
        for refused in (lambda: hk.mask(masked, plan), lambda: hk.reconstruct(masked, plan, tokens)):
            with pytest.raises(
                HywiaError, match=r"do_layer_norm_before=False in its config no layer of this model can"
            ):
                refused()
        assert torch.equal(logits(masked, tokens), logits(model, tokens))
        return
    hk.mask(masked, plan)
    want = logits(masked, tokens)
    hk.prune(model, plan)
    assert relative(logits(model, tokens), want) <= 1e-5


def test_saved_and_reloaded_in_a_fresh_process(tmp_path):
    """Whole layers alone by stock transformers without this package; with unequal widths by the adaptive classes."""
    tokens, jobs, wanted = token_ids(), [], []
    for family in GOING:
        for layout in ("uniform", "adaptive") if family in distinct(GOING) else ("uniform",):
            model = fresh(family)
            plan = layer_plan(model, (0, 2), units=() if layout == "uniform" else ("mlp",), only=2)
            hk.prune(model, plan)
            folder = tmp_path / f"{family.name}-{layout}"
            hk.save(model, None, folder, plan=plan)
            record = json.loads((folder / "hywia.json").read_text())
            assert (record["not_stock"] is None) == (layout == "uniform"), (family.name, record["not_stock"])
            assert record["kept_units"]["layers"] == [0, 2]
            assert not any(f".{1}." in name for name in record["kept_units"])
            jobs.append({"folder": str(folder), "out": f"{folder}.pt", "stock": layout == "uniform"})
            wanted.append((logits(model, tokens), written(model, tokens[:2])))
            write_tokenizer(folder)
            assert len(arch.layers_of(hk.skeleton(folder))) == 2
    content = {"tokens": tokens.tolist(), "jobs": jobs}
    results = run_jobs(Path(__file__).with_name("reload_families.py"), content, tmp_path)
    for job, (want, ids), result in zip(jobs, wanted, results, strict=True):
        assert torch.equal(torch.load(job["out"], weights_only=True), want), job["folder"]
        assert result["ids"] == ids, job["folder"]


@pytest.mark.parametrize("family", distinct(GOING), ids=lambda f: f.name)
def test_a_cut_of_layers_that_fails_is_taken_back(family, monkeypatch):
    model, text = fresh(family), token_ids()
    plan = layer_plan(model, (0, 2), units=("mlp",))
    before, said, flags = values(model), numbers(model), hooks_and_forwards(model)
    want = logits(model, text)
    follow = surgery._follow_config
    monkeypatch.setattr(surgery, "_follow_config", lambda *a: follow(*a) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hk.prune(model, plan)
    assert_as_it_was(model, before, said, flags)
    assert torch.equal(logits(model, text), want)
    monkeypatch.undo()
    hk.prune(model, plan)
    assert len(arch.layers_of(model)) == 2


@pytest.mark.parametrize("name", ["gemma3_text", "olmo3", "qwen2", "smollm3", "qwen3_moe"])
def test_types_of_layers_go_along(name, tmp_path):
    """Of Gemma 3 and OLMo 3 also what the model keeps for a type of layer that is gone."""
    model = fresh_named(name)
    config = arch.text_config(model)
    before = {f: list(getattr(config, f)) for f in ("layer_types", "no_rope_layers") if hasattr(config, f)}
    hk.prune(model, layer_plan(model, (0, 2)))
    for field, types in before.items():
        assert getattr(config, field) == [types[0], types[2]]
    if name == "qwen3_moe":
        assert (config.mlp_only_layers, config.decoder_sparse_step) == ([], 1)
    hk.save(model, None, tmp_path / "made")
    write_tokenizer(tmp_path / "made")
    loaded = hk.load(tmp_path / "made")[0]
    assert fingerprint(loaded) == fingerprint(model)
    assert torch.equal(logits(loaded, token_ids()), logits(model, token_ids()))


def test_experts_of_every_second_layer_are_named_anew():
    from transformers import AutoConfig, AutoModelForCausalLM

    family = next(f for f in GOING if f.name == "qwen3_moe")
    fields = family.config | dict(num_hidden_layers=5, mlp_only_layers=[3], decoder_sparse_step=2, vocab_size=131)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **fields)).eval()
    kinds = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    assert kinds == [False, True, False, False, False]
    hk.prune(model, layer_plan(model, (1, 2, 4)))
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [True, False, False]
    assert (model.config.mlp_only_layers, model.config.decoder_sparse_step) == ([1, 2], 1)
    twin = AutoModelForCausalLM.from_config(model.config)
    assert {n: p.shape for n, p in twin.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_a_place_that_enters_the_mathematics_is_refused():
    model = fresh_named("gpt2")
    plan = layer_plan(model, (0, 2))
    model.config.scale_attn_by_inverse_layer_idx = True
    for refused in (
        lambda: arch.check_depth(model, (0, 2)),
        lambda: planning.check_reachable(model, ratio=0.2, units=("layers",)),
    ):
        with pytest.raises(
            HywiaError, match=r"scale_attn_by_inverse_layer_idx=False, got True: a layer's place enters"
        ):
            refused()
    assert len(plan.depth.gone) == 1


def test_types_that_a_config_cannot_list_are_refused(monkeypatch):
    """A family whose layers' types followed from their places alone, which this one's would without its list."""
    monkeypatch.setattr("hywia_kernels.arch.depth._TYPES", ())
    model = fresh_named("smollm3")
    plan = layer_plan(model, (0, 2))
    before, said, flags = values(model), numbers(model), hooks_and_forwards(model)
    with pytest.raises(
        HywiaError, match=r"a smollm3 config cannot describe the layers that stay: .*; use other --units"
    ):
        hk.prune(model, plan)
    assert_as_it_was(model, before, said, flags)


def test_layers_that_share_parameters_are_refused():
    model = fresh_named("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(HywiaError, match="layers share parameters with each other"):
        arch.layer_parameters(model)


def test_layers_go_twice_and_from_an_adaptive_checkpoint(tmp_path):
    """The layer that differs goes last: what is left is a stock checkpoint."""
    tokens, model = token_ids(), fresh_named("llama")
    hk.prune(model, layer_plan(model, (0, 1, 2), units=("mlp",), only=1))
    hk.save(model, None, tmp_path / "first")
    assert (
        json.loads((tmp_path / "first" / "hywia.json").read_text())["not_stock"] == "layers differ in intermediate_size"
    )
    write_tokenizer(tmp_path / "first")
    model = hk.load(tmp_path / "first")[0]
    plan = layer_plan(model, (1, 2))
    want = logits(skipping(model, (0,)), tokens)
    hk.prune(model, plan)
    assert relative(logits(model, tokens), want) <= 1e-6
    hk.save(model, None, tmp_path / "second", plan=plan)
    write_tokenizer(tmp_path / "second")
    want, model = logits(model, tokens), hk.load(tmp_path / "second")[0]
    assert torch.equal(logits(model, tokens), want)
    assert all(name.startswith("model.layers.0.mlp") for name in model.config.module_changes)
    assert model.config.layer_widths["intermediate_size"] == [24, 44]
    hk.prune(model, layer_plan(model, (1,)))
    hk.save(model, None, tmp_path / "third")
    assert json.loads((tmp_path / "third" / "hywia.json").read_text())["not_stock"] is None
    assert json.loads((tmp_path / "third" / "config.json").read_text())["num_hidden_layers"] == 1

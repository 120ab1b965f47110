"""What every entry of the table must keep, on a tiny model of its family."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels import HywiaError, UsageError, arch
from hywia_kernels.deploy.cost import cost_of
from hywia_kernels.method import surgery
from tests.support.comparison import logits, relative
from tests.support.cuts import make_plan
from tests.support.experts import check_refitted
from tests.support.families import FAMILIES, fresh, fresh_named, token_ids
from tests.support.processes import run_jobs
from tests.support.shapes import all_cuts, distinct, saved_cuts
from tests.support.statistics import assert_statistics, family_statistics

CASES = [
    pytest.param(family, cut, id=f"{family.name}-{cut}") for family in FAMILIES for cut in all_cuts(family, FAMILIES)
]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
every_shape = pytest.mark.parametrize("family", distinct(FAMILIES), ids=lambda f: f.name)


def test_every_shape_of_entry_is_cut_in_every_way():
    full = {family.name for family in distinct(FAMILIES)}
    assert {"llama", "mistral", "gemma2", "gemma3", "olmo2", "phi", "phi3", "starcoder2"} <= full
    assert {"gpt_neox", "opt", "gpt2", "bloom", "mixtral", "qwen3_moe"} <= full
    assert {"qwen2", "qwen3", "olmo3", "gemma3_text"}.isdisjoint(full)
    whole = [cut for family, cut in (case.values for case in CASES) if family.name == "mixtral"]
    assert whole == ["mlp", "attention", "both", "adaptive", "experts", "all", "adaptive-mlp", "adaptive-attention"]
    assert [cut for family, cut in (case.values for case in CASES) if family.name == "qwen3"] == ["both", "adaptive"]


class TestContract:
    """A new entry passes by adding a `Family`."""

    @pytest.mark.parametrize(("family", "cut"), CASES)
    def test_pruned_equals_masked(self, family, cut):
        model, tokens = fresh(family), token_ids()
        plan = make_plan(model, cut)
        masked = copy.deepcopy(model)
        hk.mask(masked, plan)
        want = logits(masked, tokens)
        assert relative(want, logits(model, tokens)) > 1e-2, "the mask must matter for the comparison to mean anything"
        work = cost_of(model, plan)
        hk.prune(model, plan)
        assert relative(logits(model, tokens), want) <= 1e-5
        assert cost_of(model) == work, "what a plan is said to save is what it saves"
        assert sum(p.numel() for p in model.parameters()) == plan.parameters_after
        counts = {g.name: g.units for g in hk.groups(model)}
        gone = cut in ("experts", "all")  # with the groups of their channels
        assert counts == {g.name: plan.keep[g.name].numel() for g in plan.groups if not gone or g.name in counts}

    @every_family
    def test_statistics_equal_a_plain_loop(self, family, monkeypatch):
        """By every pass that serves the family; layerwise in runs of one or two samples; ragged samples too."""
        monkeypatch.setattr("hywia_kernels.engine.memory.CHUNK_TOKENS", 27)
        model, tokens = fresh(family), token_ids()
        ways = [("auto", "auto"), ("autograd", "fast"), ("autograd", "lean")]
        ways += [("fused", "fast"), ("fused", "lean"), ("fused", "layerwise")]
        if family.experts:
            with pytest.raises(UsageError, match=r"'fused' and model\.layers\.0\.mlp\.experts, whose tokens"):
                hk.calibrate(model, tokens, engine="fused", memory=ways.pop()[1])
        for samples in (list(tokens), [tokens[0], tokens[1, :7], tokens[2, :2], tokens[3, :11]]):
            plain = family_statistics(family, model, samples)
            for engine, memory in ways:
                statistics = hk.calibrate(model, samples, engine=engine, memory=memory)
                if engine == "auto":
                    assert (statistics.record["engine"], statistics.record["not_fused"]) == ("fused", None)
                assert_statistics(statistics, plain, (engine, memory))

    def test_saved_and_reloaded_in_a_fresh_process(self, tmp_path):
        """One process for all families and cuts. Where the family's config can say it, stock transformers alone."""
        tokens = token_ids()
        jobs, wanted = [], []
        for family in FAMILIES:
            for cut in saved_cuts(family, FAMILIES):
                model = fresh(family)
                hk.prune(model, make_plan(model, cut))
                folder = tmp_path / f"{family.name}-{cut}"
                hk.save(model, None, folder)
                record = json.loads((folder / "hywia.json").read_text())
                assert (record["not_stock"] is None) == (cut in family.stock), (family.name, cut, record["not_stock"])
                mask = torch.ones_like(tokens[:2])
                ids = model.generate(tokens[:2], attention_mask=mask, do_sample=False, max_new_tokens=6)
                jobs.append({"folder": str(folder), "out": f"{folder}.pt", "stock": cut in family.stock})
                wanted.append((logits(model, tokens), ids.tolist()))
        content = {"tokens": tokens.tolist(), "jobs": jobs}
        results = run_jobs(Path(__file__).with_name("reload_families.py"), content, tmp_path)
        for job, (want, ids), result in zip(jobs, wanted, results, strict=True):
            assert torch.equal(torch.load(job["out"], weights_only=True), want), job["folder"]
            assert result["ids"] == ids, job["folder"]
            assert (result["class"] != "HywiaAdaptiveForCausalLM") == job["stock"], job["folder"]

    @every_family
    def test_refitted_is_nearer_and_cuts_like_any(self, family):
        """The least squares see every family's output matrices; the cut model is the refitted one."""
        model, text = fresh(family), torch.randint(2, 131, (40, 14), generator=torch.Generator().manual_seed(5))
        plan = make_plan(model, "both")
        masked, refitted = copy.deepcopy(model), copy.deepcopy(model)
        hk.mask(masked, plan)
        after = hk.reconstruct(refitted, plan, text, ridge=1e-2)
        errors = after.record["refit"]["relative_error"]
        assert len(errors) == sum(1 for g in plan.groups if g.kind != "experts")
        assert all(new < old for old, new in errors.values())
        want = logits(model, text)
        assert relative(logits(refitted, text), want) < relative(logits(masked, text), want)
        want = logits(refitted, text[:4])
        hk.prune(refitted, after)
        assert relative(logits(refitted, text[:4]), want) <= 1e-5

    @every_family
    def test_trained_layers_are_nearer_and_cut_like_any(self, family):
        model, text = fresh(family), torch.randint(2, 131, (40, 14), generator=torch.Generator().manual_seed(5))
        after = hk.reconstruct(model, make_plan(model, "both"), text, ridge=1e-2, passes=8)
        errors = after.record["refit"]["layer_error"]
        assert len(errors) == len(arch.layers_of(model))
        assert all(new <= old for old, new in errors.values())
        assert any(new < 0.98 * old for old, new in errors.values())
        want = logits(model, text[:4])
        hk.prune(model, after)
        assert relative(logits(model, text[:4]), want) <= 1e-5


def test_the_vision_tower_is_left_alone():
    model = fresh_named("gemma3")
    before = {n: p.clone() for n, p in model.named_parameters() if "language_model.layers" not in n}
    statistics = hk.calibrate(model, token_ids())
    assert statistics.record["left_alone"] == ["model.vision_tower", "model.multi_modal_projector"]
    hk.prune(model, make_plan(model, "both"))
    after = dict(model.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in before.items())
    assert any("vision_tower" in n for n in before)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_removed_experts_are_as_if_the_router_gave_them_nothing(name):
    """Masked without the package: their logits at minus infinity, softmax and choice written out."""
    model, tokens = fresh_named(name), token_ids()
    masked, plan = copy.deepcopy(model), make_plan(model, "experts")
    renormalised = name == "mixtral"
    for group in plan.groups:
        if group.kind != "experts":
            continue
        keep = plan.keep[group.name].tolist()
        assert len(keep) == 3
        gone = [e for e in range(5) if e not in keep]

        def choose(module, args, output, gone=gone):
            logits = output[0].clone()
            logits[:, gone] = float("-inf")
            shares, chosen = logits.softmax(-1).topk(2, dim=-1)
            return logits, shares / shares.sum(-1, keepdim=True) if renormalised else shares, chosen

        masked.get_submodule(group.members[0].module).register_forward_hook(choose)
    want = logits(masked, tokens)
    hk.prune(model, plan)
    assert relative(logits(model, tokens), want) <= 1e-5


def test_fewer_experts_than_a_token_is_sent_to_are_refused():
    model = fresh_named("mixtral")
    plan = make_plan(model, "experts")
    name = next(g.name for g in plan.groups if g.kind == "experts")
    keep = {**plan.keep, name: torch.tensor([1])}
    with pytest.raises(HywiaError, match=r"experts keeps 1; every such group must keep at least 2 expert"):
        hk.prune(model, dataclasses.replace(plan, keep=keep))


def test_experts_of_one_layer_must_stay_equally_wide():
    model = fresh_named("mixtral")
    plan = make_plan(model, "mlp")
    before = {n: p.shape for n, p in model.named_parameters()}
    keep = {**plan.keep, "model.layers.1.mlp.3": torch.arange(5)}
    with pytest.raises(HywiaError, match=r"model\.layers\.1\.mlp\.4 keeps 8 and model\.layers\.1\.mlp\.3 5"):
        hk.prune(model, dataclasses.replace(plan, keep=keep))
    assert before == {n: p.shape for n, p in model.named_parameters()}


@every_shape
def test_resize_gives_the_shapes_of_a_cut(family):
    for cut in ("mlp", "adaptive"):
        model = fresh(family)
        empty, plan = copy.deepcopy(model), make_plan(model, cut)
        counts = {n: keep.numel() for n, keep in plan.keep.items()}
        if family.name == "bloom" and cut == "adaptive":
            with pytest.raises(HywiaError, match="slopes that belong to heads"):
                surgery.resize(empty, counts)
            continue
        surgery.resize(empty, counts)
        hk.prune(model, plan)
        shapes = {n: p.shape for n, p in model.named_parameters()}
        assert {n: p.shape for n, p in empty.named_parameters()} == shapes
        assert hk.groups(empty) == hk.groups(model)
        assert logits(empty, token_ids()).shape == (4, 13, 131)


@every_shape
def test_magnitude_is_the_norm_of_the_parts(family):
    model = fresh(family)
    scores = hk.score(model, criterion="magnitude")
    weights = dict(model.named_parameters())
    for group in scores.groups:
        if group.kind == "experts" or (family.experts and group.kind == "mlp"):
            continue
        parts = family.attention if group.kind == "attention" else family.mlp
        for u in range(group.units):
            want = sum(
                float(part(weights[f"{family.layers}.{group.layer}.{n}"], u).square().sum()) for n, part in parts
            )
            assert float(scores.values[group.name][u]) == pytest.approx(want, rel=1e-5)


@every_shape
def test_a_refitted_model_is_cut_as_it_was_solved(family):
    model, tokens = fresh(family), token_ids()
    plan = make_plan(model, "attention" if family.experts else "adaptive")
    dense = logits(model, tokens)
    masked = copy.deepcopy(model)
    hk.mask(masked, plan)
    plan = hk.reconstruct(model, plan, tokens)
    errors = plan.record["refit"]["relative_error"]
    cut = [g for g in plan.groups if plan.keep[g.name].numel() < g.units]
    assert sorted(errors) == sorted(g.members[-1].module for g in cut)
    assert all(after < before for before, after in errors.values())
    want = logits(model, tokens)
    hk.prune(model, plan)
    assert relative(logits(model, tokens), want) <= 1e-5
    assert relative(want, dense) < relative(logits(masked, tokens), dense)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_whole_experts_go_without_a_refit(name):
    model = fresh_named(name)
    plan = make_plan(model, "experts")
    masked = copy.deepcopy(model)
    hk.mask(masked, plan)
    after = hk.reconstruct(model, plan, token_ids())
    assert after.record["refit"]["relative_error"] == {}
    experts = [n for n, _ in model.named_parameters() if "experts." in n]
    parameters, want = dict(model.named_parameters()), dict(masked.named_parameters())
    assert experts
    assert all(torch.equal(parameters[n], want[n]) for n in experts)
    hk.prune(model, after)
    assert relative(logits(model, token_ids()), logits(masked, token_ids())) <= 1e-5


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_refitted_on_the_tokens_that_reach_them(name):
    """The first layer's experts, against a regression written out: this text, these shares, this ridge."""
    model, tokens = fresh_named(name), torch.randint(2, 131, (30, 14), generator=torch.Generator().manual_seed(5))
    plan = make_plan(model, "mlp")
    dense, layer = copy.deepcopy(model), model.model.layers[0]
    seen, out = [], []
    hooks = [
        dense.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args)),
        dense.model.layers[0].register_forward_hook(
            lambda *a: out.append(a[2][0] if isinstance(a[2], tuple) else a[2])
        ),
    ]
    logits(dense, tokens)
    for hook in hooks:
        hook.remove()
    (hidden, chosen, shares), weight = seen[0], 1.0 / out[0].flatten(0, 1).square().mean(1)
    hk.reconstruct(model, plan, tokens, ridge=0.3)
    stack = dense.model.layers[0].mlp.experts
    entered = {"hidden": hidden, "weight": weight, "chosen": chosen, "shares": shares}
    for expert in range(5):
        keep = plan.keep[f"model.layers.0.mlp.{expert}"]
        reached, got = check_refitted(layer.mlp.experts, stack, expert, keep, **entered, ridge=0.3)
        assert 0 < reached < len(hidden)
        gone = [j for j in range(got.shape[1]) if j not in keep.tolist()]
        assert not got[:, gone].any()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_and_heads_go_in_one_plan(name):
    """As many experts stay as a token is sent to, and the cut model is the masked one, and loads again."""
    model, tokens = fresh_named(name), token_ids()
    plan = hk.plan(
        hk.score(model, criterion="random"),
        group_ratio={"experts": 0.6, "attention": 0.34},
        units=("experts", "attention"),
    )
    widths = {
        kind: {plan.keep[g.name].numel() for g in plan.groups if g.kind == kind} for kind in ("experts", "attention")
    }
    assert widths == {"experts": {2}, "attention": {2}}
    masked = copy.deepcopy(model)
    hk.mask(masked, plan)
    hk.prune(model, plan)
    assert model.config.num_experts_per_tok == 2
    assert relative(logits(model, tokens), logits(masked, tokens)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("gpt_neox", dict(interleaved=False)),  # q, k and v taken for three runs of rows
        ("bloom", dict(alibi=None)),  # survivors biased by the slopes of the first heads
        ("olmo2", dict(wide_norms={})),  # norms that divide by the rms of fewer features
    ],
)
def test_a_wrong_entry_is_caught(name, wrong, monkeypatch):
    model, tokens = fresh_named(name), token_ids()
    entry = arch.architecture(model)
    planted = dataclasses.replace(entry, attention=dataclasses.replace(entry.attention, **wrong))
    table = tuple(planted if e is entry else e for e in arch.TABLE)
    monkeypatch.setattr("hywia_kernels.arch.discovery.TABLE", table)
    plan = make_plan(model, "attention")
    masked = copy.deepcopy(model)
    hk.mask(masked, plan)
    hk.prune(model, plan)
    if name == "bloom":  # as a model that makes biases for the heads that are left would
        model.transformer.num_heads = 4
    assert relative(logits(model, tokens), logits(masked, tokens)) > 1e-2

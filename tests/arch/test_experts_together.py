"""Whole experts, channels of those that stay, and heads, in one plan."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hywia_kernels as hk
from hywia_kernels import HywiaError
from hywia_kernels.cli import main
from hywia_kernels.method.selection import estimated_loss, splits
from tests.support.comparison import logits, relative
from tests.support.derived import prompt, small
from tests.support.experts import check_refitted
from tests.support.families import fresh_named, token_ids
from tests.support.tokenizers import text, write_tokenizer

ALL = ("mlp", "attention", "experts")
TABLE = ("mixtral", "qwen3_moe")
# Latent heads, a dense first layer, routed and shared experts; a gated shared expert beside routed ones; hybrid layers.
DERIVED = ("deepseek_v2", "qwen2_moe", "granitemoehybrid")


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


def stacks(model) -> list[tuple[hk.Group, list[hk.Group]]]:
    """`(whole experts, their channels)` of each layer, found by name."""
    groups = hk.groups(model)
    found = [g for g in groups if g.kind == "experts"]
    return [(g, [c for c in groups if c.tied_width and c.layer == g.layer]) for g in found]


@pytest.mark.parametrize("name", TABLE)
def test_parameters_are_counted_once(name):
    """Of 5 experts of 12 channels 3 stay, of 8 channels each: 2 whole ones go, and 4 channels of 3."""
    model = fresh_named(name)
    before, hidden, layers = parameters(model), 36, len(stacks(model))
    scores = hk.score(model, criterion="random", seed=5)
    plan = hk.plan(scores, group_ratio={"experts": 0.4, "mlp": 0.34}, align=4)
    counts = {g.name: plan.keep[g.name].numel() for g in plan.groups}
    assert {counts[whole.name] for whole, _ in stacks(model)} == {3}
    assert {counts[c.name] for _, channels in stacks(model) for c in channels} == {8}
    gone = layers * (2 * (3 * 12 * hidden + hidden) + 3 * 4 * 3 * hidden)
    dense = sum(3 * hidden * (g.units - counts[g.name]) for g in plan.groups if g.kind == "mlp" and not g.tied_width)
    assert (dense == 0) == (name == "mixtral")
    assert plan.parameters_after == before - gone - dense
    hk.prune(model, plan)
    assert parameters(model) == plan.parameters_after


@pytest.mark.parametrize("ratio", [0.12, 0.3, 0.38])
@pytest.mark.parametrize("units", [ALL, ("mlp", "experts")])
def test_a_ratio_is_met_and_reported_exactly(ratio, units):
    """With scores that estimate the loss, and with some that do not."""
    model, tokens = fresh_named("mixtral"), token_ids()
    before = parameters(model)
    step = sum(g.unit_parameters for g in hk.groups(model) if g.kind == "mlp")
    for scores in (hk.score(model, tokens), hk.score(model, criterion="magnitude")):
        plan = hk.plan(scores, ratio=ratio, units=units, align=1)
        assert abs(plan.parameters_before - plan.parameters_after - ratio * before) <= step
        assert all(plan.keep[w.name].numel() >= model.config.num_experts_per_tok for w, _ in stacks(model))
        pruned = copy.deepcopy(model)
        hk.prune(pruned, plan)
        assert parameters(pruned) == plan.parameters_after


def test_the_estimate_counts_an_expert_that_goes_once():
    """What `plan` compares is the loss of the units that go: of an expert its own, and none of its channels'."""
    model = fresh_named("mixtral")
    scores = hk.score(model, token_ids())
    plan = hk.plan(scores, group_ratio={"experts": 0.4, "mlp": 0.34}, align=4)
    want = 0.0
    for whole, channels in stacks(model):
        stay = plan.keep[whole.name].tolist()
        assert len(stay) == 3
        want += sum(float(scores.loss[whole.name][e]) for e in range(5) if e not in stay)
        for e in stay:
            kept = plan.keep[channels[e].name].tolist()
            want += sum(float(scores.loss[channels[e].name][c]) for c in range(12) if c not in kept)
    assert estimated_loss(scores, plan) == pytest.approx(want, rel=1e-6)
    # Of the widths that meet a ratio, the estimate's own choice comes first.
    options = splits(scores, ratio=0.3, units=ALL, align=1)
    losses = [estimated_loss(scores, hk.plan(scores, ratio=0.3, units=ALL, align=1, split=split)) for split in options]
    assert len({split["experts"] for split in options}) > 1
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]


def test_free_experts_go_before_channels():
    """With estimates that make experts free, as many go as can; that make channels free, none."""
    model = fresh_named("mixtral")
    scores = hk.score(model, token_ids())
    for cheap, stay in (("experts", {2, 3}), ("mlp", {5})):
        loss = {g.name: torch.full((g.units,), 1e-6 if g.kind == cheap else 1.0) for g in scores.groups}
        altered = hk.Scores(scores.groups, scores.values, loss, scores.parameters, scores.fingerprint)
        plan = hk.plan(altered, ratio=0.3, units=("mlp", "experts"), align=1)
        assert set(plan.widths("experts")) <= stay


def test_layers_share_channels_of_the_experts_that_stay():
    """Adaptive widths remove as much as equal ones, to within a step, and are equal inside a layer."""
    model = fresh_named("mixtral")
    scores = hk.score(model, token_ids())
    request = dict(group_ratio={"experts": 0.4, "mlp": 0.34, "attention": 0.34}, align=4)
    uniform, adaptive = hk.plan(scores, **request), hk.plan(scores, **request, layout="adaptive")
    step = 3 * 4 * max(g.unit_parameters for g in scores.groups if g.kind == "mlp")
    assert abs(uniform.parameters_after - adaptive.parameters_after) <= step
    widths = [{adaptive.keep[c.name].numel() for c in channels} for _, channels in stacks(model)]
    assert all(len(width) == 1 for width in widths)
    assert uniform.layout == "uniform"
    assert {w for width in widths for w in width} <= {4, 8, 12}
    masked = copy.deepcopy(model)
    hk.mask(masked, adaptive)
    hk.prune(model, adaptive)
    assert parameters(model) == adaptive.parameters_after
    assert relative(logits(model, token_ids()), logits(masked, token_ids())) <= 1e-5


@pytest.mark.parametrize("name", DERIVED)
def test_derived_families_lose_all_kinds_and_reload(name, tmp_path):
    model, tokens = small(name), prompt()
    assert set(hk.prove(model).kinds) == set(ALL)
    chosen = model.config.num_experts_per_tok
    plan = hk.plan(hk.score(model, criterion="random", seed=5), group_ratio=0.4, units=ALL, align=8)
    cut = {g.kind for g in plan.groups if plan.keep[g.name].numel() < g.units}
    assert cut == set(ALL)
    dense, masked = logits(model, tokens), copy.deepcopy(model)
    hk.mask(masked, plan)
    want = logits(masked, tokens)
    assert relative(want, dense) > 1e-2, "the mask must matter"
    hk.prune(model, plan)
    assert parameters(model) == plan.parameters_after
    assert relative(logits(model, tokens), want) <= 1e-5
    assert model.config.num_experts_per_tok == chosen
    for group in hk.groups(model):
        assert group.kind != "experts" or group.units >= chosen
    hk.save(model, None, tmp_path / "out", plan=plan)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert relative(logits(again, tokens), logits(model, tokens)) <= 1e-5
    assert parameters(again) == plan.parameters_after


@pytest.mark.parametrize("name", TABLE)
def test_experts_that_stay_are_refitted_on_the_tokens_that_now_reach_them(name):
    """The first layer's experts, against a regression written out: tokens are sent to the best of those that stay."""
    model, tokens = fresh_named(name), torch.randint(2, 131, (30, 14), generator=torch.Generator().manual_seed(5))
    plan = hk.plan(hk.score(model, criterion="random", seed=5), group_ratio={"experts": 0.4, "mlp": 0.34}, align=4)
    dense, layer = copy.deepcopy(model), model.model.layers[0]
    seen, out = [], []
    mlp = dense.model.layers[0].mlp
    hooks = [
        mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1))),
        dense.model.layers[0].register_forward_hook(
            lambda *a: out.append(a[2][0] if isinstance(a[2], tuple) else a[2])
        ),
    ]
    logits(dense, tokens)
    for hook in hooks:
        hook.remove()
    hidden, weight = seen[0], 1.0 / out[0].flatten(0, 1).square().mean(1)
    stay = plan.keep["model.layers.0.experts"]
    shares, places = (hidden @ mlp.gate.weight[stay].T).softmax(-1).topk(2, dim=-1)
    shares = shares / shares.sum(-1, keepdim=True) if name == "mixtral" else shares
    chosen = stay[places]
    errors = hk.reconstruct(model, plan, tokens, ridge=0.3).record["refit"]["relative_error"]
    assert sum(n.startswith("model.layers.0.") for n in errors) == 3
    entered = {"hidden": hidden, "weight": weight, "chosen": chosen, "shares": shares}
    for expert in stay.tolist():
        keep = plan.keep[f"model.layers.0.mlp.{expert}"]
        reached, _ = check_refitted(layer.mlp.experts, mlp.experts, expert, keep, **entered, ridge=0.3)
        assert len(keep) < reached < len(hidden)


@pytest.mark.parametrize("name", [*TABLE, "deepseek_v2"])
def test_a_refitted_model_is_cut_as_it_was_solved(name):
    model = small(name) if name not in TABLE else fresh_named(name)
    tokens = torch.randint(5, 131, (24, 14), generator=torch.Generator().manual_seed(5))
    hk.prove(model)
    plan = hk.plan(hk.score(model, tokens[:8]), group_ratio=0.4, units=ALL, align=8 if name not in TABLE else 4)
    dense, masked = logits(model, tokens), copy.deepcopy(model)
    hk.mask(masked, plan)
    plan = hk.reconstruct(model, plan, tokens, ridge=1e-2)
    refitted = copy.deepcopy(model)
    hk.mask(refitted, plan)  # routers choose among all experts again once the layers are solved
    want = logits(refitted, tokens)
    assert relative(want, dense) < relative(logits(masked, tokens), dense)
    hk.prune(model, plan)
    assert relative(logits(model, tokens), want) <= 1e-5


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("mixtral", ["--ratio", "0.3"]),
        ("mixtral", ["--group-ratio", "0.4"]),
        ("qwen3_moe", ["--group-ratio", "0.4"]),
    ],
)
def test_by_one_command(name, request_, tmp_path, monkeypatch):
    fresh_named(name).save_pretrained(tmp_path / name)
    write_tokenizer(tmp_path / name)
    (tmp_path / "text.txt").write_text(text())
    monkeypatch.chdir(tmp_path)
    small_run = ["--samples", "3", "--seq-len", "12", "--align", "4", "--calib", "text.txt", "--no-eval"]
    arguments = [*request_, "--units", "mlp,attention,experts", *small_run, "--json", "r.json"]
    assert main(["prune", name, "-o", "out", *arguments]) == 0
    plan = json.loads((tmp_path / "r.json").read_text())["plan"]
    assert plan["units"] == list(ALL)
    record = json.loads((tmp_path / "out" / "hywia.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # Channels are shared out among the layers where a group's ratio is asked for, and these may end up alike.
    assert (config["model_type"] == name) == (record["not_stock"] is None)
    assert record["not_stock"] is None or request_[0] == "--group-ratio"
    model, _ = hk.load("out")
    widths = {kind: {g.units for g in hk.groups(model) if g.kind == kind} for kind in ALL}
    assert min(widths["experts"]) >= model.config.num_experts_per_tok
    assert parameters(model) == plan["parameters_after"] < plan["parameters_before"]
    assert torch.isfinite(logits(model, token_ids())).all()


def test_experts_of_a_layer_stay_equally_wide_when_some_go():
    model = fresh_named("mixtral")
    plan = hk.plan(hk.score(model, criterion="random"), group_ratio={"experts": 0.4, "mlp": 0.34}, align=4)
    gone = next(e for e in range(5) if e not in plan.keep["model.layers.1.experts"].tolist())
    keep = {**plan.keep, f"model.layers.1.mlp.{gone}": torch.arange(12)}
    with pytest.raises(HywiaError, match=r"must stay equally wide"):
        hk.Plan(plan.groups, keep, plan.parameters_before, plan.parameters_after, "uniform", plan.fingerprint)

"""Whole chains on models of several families: the command line, a second cut after a reload, the ratio protocol."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hywia_kernels as hk
from hywia_kernels.cli import main
from hywia_kernels.method.mask_learning import learn_masks
from tests.support.comparison import logits, relative
from tests.support.cuts import make_plan
from tests.support.families import FAMILIES, fresh, fresh_named, token_ids
from tests.support.shapes import distinct
from tests.support.tokenizers import text, write_tokenizer

SMALL = ["--samples", "3", "--seq-len", "12", "--align", "4", "--block", "16", "--max-blocks", "3"]


def directory(folder: Path, name: str) -> Path:
    fresh_named(name).save_pretrained(folder / name)
    write_tokenizer(folder / name)
    (folder / "text.txt").write_text(text())
    return folder / name


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("mixtral", ["--group-ratio", "0.4", "--units", "experts"]),
        ("qwen3_moe", ["--group-ratio", "0.4"]),
        ("gemma3", ["--ratio", "0.1"]),
        ("bloom", ["--ratio", "0.2"]),
        ("gpt2", ["--ratio", "0.2", "--units", "mlp"]),
    ],
)
def test_prune_by_command(tmp_path, monkeypatch, capsys, name, request_):
    directory(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    files = ["--calib", "text.txt", "--text", "text.txt", "--json", "r.json"]
    assert main(["prune", name, "-o", "out", *request_, *SMALL, *files]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    model, _ = hk.load("out")
    assert report["after"]["parameters"] == sum(p.numel() for p in model.parameters()) < report["before"]["parameters"]
    said = "left alone, being no part of the language decoder: model.vision_tower, model.multi_modal_projector"
    assert (said in capsys.readouterr().out) == (name == "gemma3")
    if name == "mixtral":
        assert model.config.num_local_experts == 3
        assert report["plan"]["widths"]["experts"] == [3, 3, 3]


def test_a_family_without_experts_says_so(tmp_path, monkeypatch, capsys):
    directory(tmp_path, "opt")
    monkeypatch.chdir(tmp_path)
    request = ["--group-ratio", "0.4", "--units", "experts", "--criterion", "random", "--no-eval"]
    assert main(["prune", "opt", "-o", "out", *request]) == 2
    assert "units: the model has no experts to cut" in capsys.readouterr().err


@pytest.mark.parametrize("family", distinct(FAMILIES), ids=lambda f: f.name)
def test_a_second_cut_after_a_reload(family, tmp_path):
    """Layers of different widths, saved, loaded, measured, cut again, saved and loaded again."""
    tokens, model = token_ids(), fresh(family)
    hk.prune(model, make_plan(model, "adaptive"))
    hk.save(model, None, tmp_path / "once")
    write_tokenizer(tmp_path / "once")
    once, tokenizer = hk.load(tmp_path / "once")
    assert torch.equal(logits(once, tokens), logits(model, tokens))
    assert hk.groups(once) == hk.groups(model)
    plan = hk.plan(hk.score(once, tokens), group_ratio=0.3, align=4)
    hk.prune(model, hk.plan(hk.score(model, tokens), group_ratio=0.3, align=4))
    hk.prune(once, plan)
    assert torch.equal(logits(once, tokens), logits(model, tokens))
    hk.save(once, tokenizer, tmp_path / "twice")
    twice, _ = hk.load(tmp_path / "twice")
    assert torch.equal(logits(twice, tokens), logits(model, tokens))


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3", "qwen3"])
def test_layers_that_become_equal_again_are_stock(name, tmp_path):
    tokens, model = token_ids(), fresh_named(name)
    for layers in ((1, 3), (0, 1)):
        scores = hk.score(model, criterion="random")
        hk.prune(model, hk.plan(scores, group_ratio=0.4, layers=layers, align=4))
        hk.save(model, None, tmp_path / str(layers[0]))
        write_tokenizer(tmp_path / str(layers[0]))
        reloaded, _ = hk.load(tmp_path / str(layers[0]))
        assert torch.equal(logits(reloaded, tokens), logits(model, tokens))
        model = reloaded
    record = json.loads((tmp_path / "0" / "hywia.json").read_text())
    assert record["not_stock"] is None
    assert json.loads((tmp_path / "0" / "config.json").read_text())["model_type"] == name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_ratio_is_met(family):
    """One width for all layers, in parameters of the whole model; where layers cannot share one, an error says so."""
    model = fresh(family)
    scores = hk.score(model, token_ids())
    if family.dense_layers:
        with pytest.raises(hk.HywiaError, match="mlp widths differ already"):
            hk.plan(scores, ratio=0.15, align=4)
        return
    plan = hk.plan(scores, ratio=0.12, align=4)
    assert plan.layout == "uniform"
    assert 0.05 < plan.ratio < 0.19
    before = sum(p.numel() for p in model.parameters())
    hk.prune(model, plan)
    assert 1 - sum(p.numel() for p in model.parameters()) / before == pytest.approx(plan.ratio, abs=1e-12)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_head_counts_that_a_config_refuses(name, tmp_path):
    """`ratio` avoids them; who asks for them otherwise gets a checkpoint that is no stock one, and exact."""
    one_each = next(f for f in FAMILIES if f.name == name)
    model, tokens = replace(one_each, config=one_each.config | dict(num_key_value_heads=6)).build(), token_ids()
    scores = hk.score(model, criterion="random")
    assert {g.stock_counts for g in scores.groups if g.kind == "attention"} == {(1, 2, 3, 4, 6)}
    for ratio in (0.05, 0.1, 0.2):
        assert 36 % hk.plan(scores, ratio=ratio, align=4).widths("attention")[0] == 0
    hk.prune(model, hk.plan(scores, group_ratio=0.2, units=("attention",)))
    hk.save(model, None, tmp_path / "out")
    write_tokenizer(tmp_path / "out")
    reason = json.loads((tmp_path / "out" / "hywia.json").read_text())["not_stock"]
    assert "not a multiple of the number of attention heads (5)" in reason
    again, _ = hk.load(tmp_path / "out")
    assert [g.units for g in hk.groups(again) if g.kind == "attention"] == [5, 5, 5]
    assert {g.stock_counts for g in hk.groups(again) if g.kind == "attention"} == {(1, 2, 3, 4)}
    assert hk.groups(again) == hk.groups(model)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_a_checkpoint_names_a_width_for_every_layer(tmp_path):
    model = fresh_named("mixtral")
    hk.prune(model, make_plan(model, "adaptive"))
    hk.save(model, None, tmp_path / "out")
    widths = json.loads((tmp_path / "out" / "config.json").read_text())["layer_widths"]
    assert widths["intermediate_size"] == [12, 8, 8]
    assert widths["num_key_value_heads"] == [3, 2, 2]
    assert widths["num_local_experts"] == [5, 5, 5]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_masks_are_learned_on_the_model_s_own_logits(family):
    """The first step's divergence is that of the model's logits before and after its masks; experts are refused."""
    model, tokens = fresh(family), token_ids()
    scores = hk.score(model, tokens)
    plan = hk.plan(scores, group_ratio=0.4, align=4, units=("mlp",))
    if family.experts:
        with pytest.raises(hk.HywiaError, match="is stacked experts"):
            learn_masks(model, scores, plan, tokens, steps=1)
        return
    learned = learn_masks(model, scores, plan, tokens, steps=2)
    masked = fresh(family)
    hk.mask(masked, plan)
    dense, cut = (logits(m, tokens).double().log_softmax(-1) for m in (model, masked))
    want = float((dense.exp() * (dense - cut)).sum(-1).mean())
    assert learned.record["learned"]["divergence"][0] == pytest.approx(want, rel=1e-3)


def without_alignment(model):
    """The grouped product of experts wants rows of whole 16 bytes, which odd sizes are not."""
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"
    return model


def test_bfloat16_is_cut_and_scored_in_every_family():
    tokens = token_ids()
    for family in FAMILIES:
        model = without_alignment(fresh(family).bfloat16())
        exact = hk.calibrate(fresh(family), tokens)
        low = hk.calibrate(model, tokens)
        name = next(g.name for g in exact.groups if g.kind == "mlp")
        ranks = torch.corrcoef(torch.stack([s.fine[name]["second"].log() for s in (exact, low)]))
        assert float(ranks[0, 1]) > 0.9, family.name
        plan = make_plan(model, "both")
        masked = without_alignment(fresh(family).bfloat16())
        hk.mask(masked, plan)
        hk.prune(model, plan)
        assert model.dtype == torch.bfloat16
        assert relative(logits(model, tokens), logits(masked, tokens)) <= 3e-2, family.name


@pytest.mark.parametrize("name", ["olmo2", "phi3", "gpt2", "bloom", "qwen3_moe"])
def test_scores_on_disk_keep_everything_a_group_says(name, tmp_path):
    model, tokens = fresh_named(name), token_ids()
    statistics = hk.calibrate(model, tokens)
    hk.save_scores(tmp_path / "scores", hk.fuse(statistics), statistics)
    scores, again = hk.load_scores(tmp_path / "scores")
    assert scores.groups == again.groups == hk.groups(model)
    hk.prune(model, hk.plan(scores, group_ratio=0.4, align=4))
    assert sum(p.numel() for p in model.parameters()) < scores.parameters

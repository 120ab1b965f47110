"""Settings by a share of all parameters: the widths that they come to, and that every criterion is cut to them."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import hywia_kernels as hk

from . import cuts, models, peers
from .settings import SETTINGS, Setting, expanded, setting, widths_of_split

HALF = Setting(ratio=0.4)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return models.build("tiny", None, "float32", torch.device("cpu"))


@pytest.fixture(scope="module")
def bench(model):
    tokens = torch.randint(0, 256, (96, 12), generator=torch.Generator().manual_seed(2))
    return cuts.Bench(model, lambda seed, count: tokens[:count], range(0, 2), align=16, text=96)


def test_names_of_settings():
    assert setting("P50") == Setting(ratio=0.5)
    assert setting("P50:2") == Setting(ratio=0.5, kv_groups=2)
    assert expanded(["A50", "P30", "P50:3"], [1, 2]) == ["A50", "P30:1", "P30:2", "P50:3"]
    assert expanded(["A50", "P30"], None) == ["A50", "P30"]
    for name in ("P40", "A50:1", "P50:", "P50:x"):
        with pytest.raises(ValueError, match="expected one of A25, A50"):
            setting(name)
    assert SETTINGS["B60"].shares == {"mlp": 0.6, "attention": 1 / 3}


def test_a_split_leaves_the_width_that_comes_nearest_to_the_share(model):
    groups = hk.groups(model)
    cost = {kind: sum(g.unit_parameters for g in groups if g.kind == kind) for kind in ("mlp", "attention")}
    total = sum(p.numel() for p in model.parameters())

    def missed(heads, channels):
        return abs((2 - heads) * cost["attention"] + (176 - channels) * cost["mlp"] - 0.4 * total)

    for heads in (1, 2):
        found = widths_of_split(model, 0.4, heads, 16)
        assert found["attention"] == heads
        assert found["mlp"] == min([*range(16, 176, 16), 176], key=lambda w: missed(heads, w))
        assert missed(heads, found["mlp"]) <= 8 * cost["mlp"] + 1
    with pytest.raises(SystemExit, match="with 2 KV groups no width of the MLP removes 95%"):
        widths_of_split(model, 0.95, 2, 16)
    with pytest.raises(SystemExit, match="expected 1 to 2 KV groups, got 3"):
        widths_of_split(model, 0.4, 3, 16)


@pytest.mark.parametrize("wanted", [HALF, Setting(ratio=0.4, kv_groups=1), Setting(ratio=0.4, kv_groups=2)])
def test_all_criteria_are_cut_to_the_widths_of_the_recipe(bench, wanted):
    total = sum(p.numel() for p in bench.model.parameters())
    with bench.pruned("recipe", 96, wanted, 0) as cut:
        recipe = {kind: cut.plan.widths(kind)[0] for kind in ("attention", "mlp")}
        removed = cut.plan.ratio
    assert abs(removed - 0.4) < 0.1
    assert wanted.kv_groups in (None, recipe["attention"])
    for name in ("lp:param_second", "wanda-sp", "flap"):
        with bench.pruned(name, 4, wanted, 0) as cut:
            for kind, width in recipe.items():
                widths = cut.plan.widths(kind)
                assert sum(widths) == 2 * width, (name, kind)
                assert name == "flap" or widths == [width, width]
            assert sum(p.numel() for p in cut.model.parameters()) == total - round(removed * total)
            assert cuts.shape(cut.plan) == {"kv_groups": recipe["attention"], "channels": recipe["mlp"]}
            assert cut.spent.seconds > 0


def test_a_cut_model_computes_what_its_mask_does(bench):
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(3))
    for name in ("lp:vectorize", "wanda-sp"):
        with bench.pruned(name, 4, HALF, 0) as cut, torch.no_grad():
            masked = copy.deepcopy(bench.model)
            hk.mask(masked, cut.plan)
            assert torch.allclose(cut.model(ids).logits, masked(ids).logits, atol=1e-5), name


def test_flap_keeps_its_biases_while_its_model_is_used(bench):
    shares = {"mlp": 0.5}
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(3))
    want = peers.flap(bench.model, bench.samples(0, 4), shares, range(0, 2))
    masked = copy.deepcopy(bench.model)
    hk.mask(masked, want.plan)
    with torch.no_grad():
        bare = masked(ids).logits
        with peers.biased(masked, want.biases):
            shifted = masked(ids).logits
        with bench.pruned("flap", 4, Setting(shares), 0) as cut:
            assert torch.allclose(cut.model(ids).logits, shifted, atol=1e-5)
            assert torch.allclose(copy.deepcopy(cut.model)(ids).logits, shifted, atol=1e-5)
    assert float((bare - shifted).abs().max()) > 1e-3


def test_scoring_counts_for_every_criterion_that_it_serves(bench):
    with bench.pruned("attention", 3, HALF, 0) as first, bench.pruned("fine", 3, HALF, 0) as second:
        spent = bench.scoring(0, 3)[1].seconds
    assert min(first.spent.seconds, second.spent.seconds) > spent > 0


@pytest.mark.parametrize("fusion", ["attention", "coarse", "mean", "product", "learned"])
def test_the_ablation_changes_the_fusion_and_nothing_else(bench, fusion):
    assert cuts.split(f"recipe-{fusion}") == (f"recipe-{fusion}", 96)
    whole = bench.recipe("recipe", 96, setting("A50"), 0)
    assert whole.fusion == "fine"
    assert bench.recipe(f"recipe-{fusion}", 96, setting("A50"), 0) == dataclasses.replace(whole, fusion=fusion)

"""One request, three ways: the command, Python and the benchmark keep the same units and write the same bytes."""

from __future__ import annotations

import dataclasses
import json

import pytest

import hywia_kernels as hk
from benchmarks import quality
from benchmarks.settings import Setting
from hywia_kernels.cli import main

TEXT = "the quick brown fox jumps over the lazy dog. " * 90
COMMON = {"calibration": "text.txt", "samples": 6, "seq_len": 16, "reconstruct_samples": 20, "align": 4}
FLAGS = ["--calib", "text.txt", "--samples", "6", "--seq-len", "16", "--refit-samples", "20", "--align", "4"]
REQUESTS = {  # settings of a recipe, and how the command line says them
    "ratio": ({"ratio": 0.3}, ["--ratio", "30%"]),
    "group ratio": ({"group_ratio": 0.5, "layers": (1, 3)}, ["--group-ratio", "0.5", "--layers", "1:3"]),
    "shares by kind": (
        {"group_ratio": {"mlp": 0.5, "attention": 0.34}},
        ["--group-ratio", "mlp=0.5,attention=34%"],
    ),
    "adaptive": ({"ratio": 0.3, "layout": "adaptive"}, ["--ratio", "0.3", "--layout", "adaptive"]),
    **{
        f"fusion {fusion}": ({"ratio": 0.25, "fusion": fusion}, ["--ratio", "0.25", "--fusion", fusion])
        for fusion in ("attention", "fine", "coarse", "mean", "product")
    },
    "first order, unreconstructed": (
        {"ratio": 0.25, "order": "first", "reconstruct": False},
        ["--ratio", "0.25", "--order", "first", "--no-refit"],
    ),
    "heads by scores": ({"ratio": 0.3, "head_ranking": "scores"}, ["--ratio", "0.3", "--head-ranking", "scores"]),
    "layers": ({"ratio": 0.3, "units": ("layers",)}, ["--ratio", "0.3", "--units", "layers"]),
    "layers and more": (
        {"ratio": 0.4, "units": ("mlp", "attention", "layers")},
        ["--ratio", "0.4", "--units", "mlp,attention,layers"],
    ),
    "a share of the layers": ({"group_ratio": {"layers": 0.34, "mlp": 0.5}}, ["--group-ratio", "layers=0.34,mlp=0.5"]),
    "learned": ({"ratio": 0.25, "fusion": "learned", "steps": 3}, ["--ratio", "0.25", "--fusion=learned", "--steps=3"]),
}
WITHOUT_TEXT = {
    "layers at random": (
        {"group_ratio": {"layers": 0.34}, "criterion": "random"},
        ["--group-ratio", "layers=0.34", "--criterion", "random"],
    ),
    "magnitude": ({"group_ratio": 0.5, "criterion": "magnitude"}, ["--group-ratio", "0.5", "--criterion", "magnitude"]),
    "random": ({"ratio": 0.3, "criterion": "random", "seed": 3}, ["--ratio", "0.3", "--criterion=random", "--seed=3"]),
}


@pytest.fixture
def here(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def outcome(folder):
    record = json.loads((folder / "hywia.json").read_text())
    return record["kept_units"], record["recipe"], (folder / "model.safetensors").read_bytes()


def by_command(here, flags):
    assert main(["prune", "model", "-o", "command", *flags, "--no-eval"]) == 0
    return outcome(here / "command")


def by_python(here, recipe):
    model, tokenizer = hk.load("model")
    result = hk.compress(model, tokenizer, recipe)
    hk.save(model, tokenizer, "python", result=result)
    return outcome(here / "python")


@pytest.mark.parametrize("name", REQUESTS)
def test_command_and_python(here, name):
    settings, flags = REQUESTS[name]
    given = [f for f in FLAGS if f not in ("--refit-samples", "20")] if "--no-refit" in flags else FLAGS
    command = by_command(here, [*flags, *given])
    python = by_python(here, hk.Recipe(**settings, **COMMON))
    assert command[1] == python[1]
    assert command[0] == python[0]
    assert command[2] == python[2]


@pytest.mark.parametrize("name", WITHOUT_TEXT)
def test_command_and_python_without_text(here, name):
    settings, flags = WITHOUT_TEXT[name]
    command = by_command(here, [*flags, "--align", "4"])
    python = by_python(here, hk.Recipe(**settings, align=4))
    assert command == python


@pytest.mark.parametrize("name", ["shares by kind", "layers", "a share of the layers"])
def test_stored_scores_and_a_recorded_recipe(here, name):
    settings, flags = REQUESTS[name]
    python = by_python(here, hk.Recipe(**settings, **COMMON))
    assert main(["score", "model", "-o", "scores", *FLAGS[:-2]]) == 0
    stored = ["prune", "model", "-o", "stored", *flags, "--scores", "scores", "--align", "4", "--refit-samples", "20"]
    assert main([*stored, "--no-eval"]) == 0
    assert outcome(here / "stored") == python
    assert main(["prune", "model", "-o", "again", "--recipe", "python/hywia.json", "--no-eval"]) == 0
    assert outcome(here / "again") == python


@pytest.mark.parametrize("criterion", ["recipe", "recipe-uniform", "recipe-unrefitted", "fine", "magnitude"])
def test_the_benchmark_measures_what_the_command_writes(here, criterion):
    model, tokenizer = hk.load("model")

    def samples(seed, count):
        return hk.calibration(model, tokenizer, "text.txt", samples=count, seq_len=16, seed=seed, fewer=True)

    bench = quality.Bench(model, samples, range(1, 3), align=4)
    shares = Setting({"mlp": 0.5, "attention": 0.34})
    recipe = bench.recipe(criterion, 6, shares, seed=0)
    text = {} if criterion == "magnitude" else {"calibration": "text.txt", "seq_len": 16}
    with bench.pruned(criterion, 6, shares, seed=0) as cut:
        plan = cut.plan
        hk.save(cut.model, tokenizer, "benchmark", plan=plan)
    python = by_python(here, dataclasses.replace(recipe, **text))
    assert {name: kept.tolist() for name, kept in plan.keep.items()} == python[0]
    assert (here / "benchmark" / "model.safetensors").read_bytes() == python[2]


FUSIONS = ("attention", "fine", "coarse", "mean", "product", "learned")


def test_an_ablation_changes_one_thing(here):
    """Recorded recipes of any two fusions differ in the fusion alone."""
    recorded = {}
    for fusion in FUSIONS:
        steps = ["--steps", "2"] if fusion == "learned" else []
        assert (
            main(["prune", "model", "-o", fusion, "--ratio", "0.25", "--fusion", fusion, *steps, *FLAGS, "--no-eval"])
            == 0
        )
        recorded[fusion] = json.loads((here / fusion / "hywia.json").read_text())["recipe"]
    assert {r["fusion"] for r in recorded.values()} == set(FUSIONS)
    for fusion, recipe in recorded.items():
        rest = {k: v for k, v in recipe.items() if k not in ("fusion", "steps")}
        assert rest == {k: v for k, v in recorded["attention"].items() if k not in ("fusion", "steps")}, fusion
    kept = {f: json.loads((here / f / "hywia.json").read_text())["kept_units"] for f in ("fine", "coarse")}
    assert kept["fine"] != kept["coarse"], "the fusion must matter"


def test_a_result_and_a_plan_are_not_both_taken(here):
    model, tokenizer = hk.load("model")
    result = hk.compress(model, tokenizer, hk.Recipe(ratio=0.3, criterion="random", align=4))
    with pytest.raises(hk.UsageError, match="plan: expected a result or a plan, got both"):
        hk.save(model, tokenizer, "out", result=result, plan=result.plan)
    assert not (here / "out").exists()
